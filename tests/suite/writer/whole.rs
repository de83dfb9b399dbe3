//! A writer that is asked everything at once, against a model: data, snapshots, sizes, bitmaps and backing files together.

use crate::support::edited::{faults, memory};
use crate::support::prng::Prng;
use crate::support::seeds::{self, shared_seeds};
use crate::support::world::{Start, World};

shared_seeds! {
    judge, 64;
    everything_at_once_0 = 0,
    everything_at_once_1 = 1,
    everything_at_once_2 = 2,
    everything_at_once_3 = 3,
    everything_at_once_4 = 4,
    everything_at_once_5 = 5,
    everything_at_once_6 = 6,
    everything_at_once_7 = 7,
}

fn judge(seed: u64) {
    let start = Start::make(seed, 700 << 10, 21, &[1, 512, 512]);
    let prng = &mut Prng::stream(seed, 91);
    let mut world = World::open(&start, memory(&start.image));
    for _ in 0..prng.between(1, 90) {
        world.step(prng);
    }
    world.finish();
    // what a writer leaves that was dropped is lost
    let was_dropped = world.said.iter().any(|said| said == "drop");
    if !was_dropped {
        assert_eq!(faults(&world.image()), (0, 0), "{}", world.said());
    }
    if seed % 4 == 0 || seeds::are_many() && seed % 2 == 0 {
        world.judge(!was_dropped);
    }
}
