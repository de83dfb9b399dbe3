//! A machine that is written to before each command of whoever backs it up, and the judgement in the end. Who that is, and
//! how it is done, is not known here.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::clean::Found;
use super::draw::draw_write;
use super::hand::{Hand, Written};
use super::history::History;
use super::proxy::{Action, Hook, Proxy, Victim};
use super::spec::DiskSpec;
use super::vm::Vm;
use crate::support::prng::Prng;

pub(crate) struct Stage {
    pub(crate) vm: Vm,
    /// The way to the machine's monitor.
    pub(crate) proxy: Proxy,
    /// The folder for the backups.
    pub(crate) target: PathBuf,
    hand: Arc<Mutex<Hand>>,
    history: Arc<Mutex<History>>,
    found: Found,
}

impl Stage {
    /// Starts a machine; up to `most` writes come before each command, and at times one that is not waited for.
    pub(crate) fn new(release: &'static str, disks: &[DiskSpec], victim: &Victim, mut prng: Prng, most: u64) -> Self {
        let mut vm = disks.iter().fold(Vm::builder(release), |vm, disk| vm.disk(disk.clone())).start();
        let found = Found::of(&mut vm);
        let history = History::zeroes(&disks.iter().map(|disk| disk.size).collect::<Vec<_>>());
        let mut hand = vm.hand(&history);
        for _ in 0..20 {
            assert_eq!(hand.guest_write(draw_write(&mut prng, disks)), Written::Done);
        }
        let hand = Arc::new(Mutex::new(hand));
        let hook = writes(Arc::clone(&hand), prng, disks.to_vec(), most);
        let proxy = Proxy::start(&vm.path("proxy"), &vm.socket(), victim, hook);
        let target = vm.path("target");
        std::fs::create_dir(&target).unwrap();
        Self { vm, proxy, target, hand, history, found }
    }

    /// From now on nothing is written.
    pub(crate) fn quiet(&self) {
        self.proxy.set_hook(Box::new(|_, _| Action::Forward));
        self.hand.lock().unwrap().finish();
    }

    /// Fails if a backup has left anything.
    #[track_caller]
    pub(crate) fn assert_clean(&mut self) {
        self.found.assert_clean(&mut self.vm, &self.target);
    }

    /// The moments that the restore points are of. The last one must be of the end.
    pub(crate) fn judge(self, points: &[Vec<Vec<u8>>]) -> Result<Vec<usize>, String> {
        self.proxy.end();
        let history = self.history.lock().unwrap();
        let moments = history.ascending(points)?;
        let last = history.moments(points.last().unwrap())?;
        let end = history.now();
        if last.contains(&end) { Ok(moments) } else { Err(format!("the last is of {last:?}, the end is {end}")) }
    }
}

fn writes(hand: Arc<Mutex<Hand>>, mut prng: Prng, disks: Vec<DiskSpec>, most: u64) -> Hook {
    Box::new(move |_, _| {
        let mut hand = hand.lock().unwrap();
        for _ in 0..prng.between(0, most) {
            hand.guest_write(draw_write(&mut prng, &disks));
        }
        if prng.one_in(2) {
            // The command meets it on its way
            hand.begin_guest_write(draw_write(&mut prng, &disks));
        }
        Action::Forward
    })
}
