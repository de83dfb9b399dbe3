//! What QEMU makes of a chain: copies of the images, each INC based on the one before it, converted to a raw file.
//!
//! That the question is the right one is shown by a second answer: each image read alone, folded by a model.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::disk::Disk;
use crate::support::random_chain::Chain;
use crate::support::seeds::{Told, shared_seeds};
use crate::support::{sparse, tools};

pub(crate) struct Oracle {
    folder: PathBuf,
}

impl Oracle {
    pub(crate) fn new(chain: &Chain) -> Self {
        let folder = chain.room("oracle");
        for (number, layer) in chain.layers.iter().enumerate() {
            sparse::copy(&chain.dir.join(&layer.name), &folder.join(&layer.name));
            if !layer.full {
                let below = &chain.layers[number - 1].name;
                let based = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below.as_str(), &layer.name];
                tools::run(tools::qemu_img().args(based).current_dir(&folder));
            }
        }
        Self { folder }
    }

    /// The content of a restore point, a raw file.
    pub(crate) fn raw(&self, chain: &Chain, number: usize) -> PathBuf {
        let raw = self.folder.join(format!("{number}.raw"));
        convert(&self.folder.join(&chain.layers[number].name), &raw);
        raw
    }
}

/// The content of an image and what lies below it.
pub(crate) fn convert(qcow2: &Path, raw: &Path) {
    tools::run(tools::qemu_img().args(["convert", "-f", "qcow2", "-O", "raw"]).args([qcow2, raw]));
}

/// The ranges of a standalone image that are there, as zeroes or as data.
fn present(qcow2: &Path) -> Vec<Range<u64>> {
    let map = tools::run(tools::qemu_img().args(["map", "-f", "qcow2", "--output", "json"]).arg(qcow2));
    let map: Value = serde_json::from_str(&map).unwrap();
    let number = |extent: &Value, key: &str| extent[key].as_u64().unwrap();
    let present = map.as_array().unwrap().iter().filter(|extent| extent["present"].as_bool().unwrap());
    present.map(|extent| number(extent, "start")..number(extent, "start") + number(extent, "length")).collect()
}

fn the_oracle_is_right(seed: u64) {
    let chain = Chain::generate(seed);
    let _told = Told(&chain);
    let before = sparse::fingerprints(&chain.target());
    let oracle = Oracle::new(&chain);
    let alone = chain.room("alone").join("alone.raw");
    let mut folded = Disk::new(0);
    for (number, layer) in chain.layers.iter().enumerate() {
        let image = chain.dir.join(&layer.name);
        convert(&image, &alone);
        let difference = layer.alone.first_difference(&alone);
        assert_eq!(difference, None, "{} alone is not what was written to it", layer.name);

        if layer.full {
            folded = layer.alone.clone();
        } else {
            folded.resize(layer.alone.size());
            for range in present(&image) {
                folded.copy(&layer.alone, &range);
            }
        }
        let difference = folded.first_difference(&oracle.raw(&chain, number));
        assert_eq!(difference, None, "{} on what is below it is not what its map says", layer.name);
    }
    assert_eq!(sparse::fingerprints(&chain.target()), before, "the oracle changed what it was asked about");
}

mod the_oracle_agrees_with_layers_read_alone {
    super::shared_seeds! {
        super::the_oracle_is_right, 32;
        first = 0, second = 1, third = 2, fourth = 3, fifth = 4, sixth = 5, seventh = 6, eighth = 7,
    }
}
