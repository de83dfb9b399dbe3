#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| qmpbackup_fuzz::run("qmp_line", bytes));
