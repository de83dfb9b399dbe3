//! Backups of running machines, judged from outside: real QEMUs of each release, with writes wherever they can hurt.
//!
//! [`vm`] starts a machine, [`hand`] writes to its disks as a guest would, [`history`] knows all that was written and
//! says which moment a restored disk is of, and [`proxy`] stands between a client and the monitor so that things happen
//! between any two commands. [`stage`] has all of it. [`client`] is a backup in a few lines, right ones and wrong ones:
//! with it all this is tested without the program. [`quiesced`] is a guest that writes files itself, with an agent, and
//! [`fake_agent`] an agent without a guest. [`faults_scene`] is where things go wrong for the program. Nothing here
//! restores: that is the business of the other modules.

mod agent_fails;
mod agent_files;
mod agent_thaw;
mod agent_times;
mod capture_random;
mod clean;
mod clean_test;
mod client;
mod draw;
mod fake_agent;
mod faults_agent;
mod faults_answers;
mod faults_folder;
mod faults_full;
mod faults_hooks;
mod faults_kill;
mod faults_monitor;
mod faults_moved;
mod faults_names;
mod faults_power;
mod faults_scene;
mod faults_told;
mod faults_twice;
mod field;
mod field_change;
mod field_files;
mod field_format;
mod field_judge;
mod field_media;
mod field_nodes;
mod field_overlay;
mod field_raw;
mod field_setup;
mod file_system;
mod guest;
mod hand;
mod hand_test;
mod history;
mod hostile_names;
mod in_place;
mod judge_test;
mod locks;
mod locks_folder;
mod monitor;
mod one_moment;
mod options_chain;
mod options_flow;
mod options_names;
mod options_select;
mod options_state;
mod options_told;
mod pauses;
mod planted;
mod proxy;
mod proxy_test;
mod python_chain;
mod quiesced;
mod spec;
mod stage;
mod tool;
mod transcript;
mod vm;
