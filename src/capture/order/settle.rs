//! Which bitmaps stay, and which go, when a run has ended or died.
//!
//! Pure: from a disk's bitmaps and its newest image to one transaction. What decides is what lies in the backup folder:
//! a bitmap whose image is there is good for the next INC; one whose image never came holds changes that the bitmap before
//! it may lack, and is poured into that one.

use serde_json::{Value, json};

use crate::capture::machine::device::Bitmap;
use crate::capture::names::{self, Since};
use crate::capture::plan::{action, transaction};
use crate::qmp::Command;

/// The bitmaps of one chain on one disk.
#[derive(Debug, Clone)]
pub(crate) struct Bitmaps<'a>(Vec<(Since, &'a Bitmap)>);

impl<'a> Bitmaps<'a> {
    /// Picks those of a chain. `names` are those of the disk, which old versions have put into the bitmap's.
    #[must_use]
    pub(crate) fn of(bitmaps: &'a [Bitmap], chain: &str, names: &[String]) -> Self {
        let mut own: Vec<(Since, &Bitmap)> =
            bitmaps.iter().filter_map(|bitmap| Some((names::since(&bitmap.name, chain, names)?, bitmap))).collect();
        own.sort_by_key(|(since, _)| *since);
        Self(own)
    }

    /// The latest of them.
    #[must_use]
    pub(crate) fn last(&self) -> Option<&'a Bitmap> {
        self.0.last().map(|(_, bitmap)| *bitmap)
    }

    /// The bitmap that goes back to the newest image, healthy or not.
    #[must_use]
    pub(crate) fn since(&self, newest: i64) -> Option<&'a Bitmap> {
        let find = |wanted| self.0.iter().find(|(since, _)| *since == wanted).map(|(_, bitmap)| *bitmap);
        find(Since::Image(newest)).or_else(|| find(Since::Newest))
    }

    /// Whether one of them holds all that is written after an image of this time, for the INC that follows.
    #[must_use]
    pub(crate) fn record(&self, newest: i64) -> bool {
        self.since(newest).is_some_and(|bitmap| bitmap.recording && !bitmap.inconsistent)
    }

    /// What brings them in order, where the newest whole image is of the time `newest` and a run of the time `ended` has
    /// ended, with an image or without.
    #[must_use]
    pub(crate) fn settle(&self, newest: Option<i64>, ended: Option<i64>) -> Option<Command> {
        let base = newest.and_then(|newest| self.since(newest)).filter(|base| !base.inconsistent);
        let mut actions = Vec::new();
        let mut orphans = Vec::new();
        let mut obsolete = Vec::new();
        for (since, bitmap) in &self.0 {
            let time = match since {
                Since::Image(time) => Some(*time),
                Since::Newest => None,
            };
            match (base, time.cmp(&newest)) {
                (Some(base), _) if base.name == bitmap.name => {}
                // its image never came
                (_, std::cmp::Ordering::Greater) if base.is_some() || time == ended => orphans.push(*bitmap),
                // one that somebody uses, as an NBD export does, goes when it is free
                (Some(_), std::cmp::Ordering::Less) if !bitmap.busy => obsolete.push(*bitmap),
                (None | Some(_), _) => {}
            }
        }
        // one that somebody has stopped lacks writes in any case
        if let Some(base) = base.filter(|base| base.recording) {
            let sound: Vec<Value> =
                orphans.iter().filter(|bitmap| !bitmap.inconsistent).map(|bitmap| bitmap.name.clone().into()).collect();
            if !sound.is_empty() {
                let data = json!({"node": base.node, "target": base.name, "bitmaps": sound});
                actions.push(action("block-dirty-bitmap-merge", data));
            }
        }
        actions.extend(
            orphans.into_iter().chain(obsolete).map(|bitmap| action("block-dirty-bitmap-remove", place(bitmap))),
        );
        transaction(actions, None)
    }
}

fn place(bitmap: &Bitmap) -> Value {
    json!({"node": bitmap.node, "name": bitmap.name})
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;
    use crate::chain::ImageId;

    fn bitmap(name: &str) -> Bitmap {
        Bitmap {
            name: name.to_owned(),
            node: "disk".to_owned(),
            count: 0,
            granularity: 65536,
            recording: true,
            busy: false,
            persistent: true,
            inconsistent: false,
        }
    }

    fn epoch(time: i64) -> String {
        names::epoch(time, ImageId::parse(&"7".repeat(32)).unwrap(), "c")
    }

    fn settle(bitmaps: &[Bitmap], newest: Option<i64>, ended: Option<i64>) -> Option<Value> {
        let command = Bitmaps::of(bitmaps, "c", &[]).settle(newest, ended)?;
        Some(command.arguments()["actions"].clone())
    }

    #[test]
    fn what_is_in_order_needs_nothing() {
        assert_eq!(settle(&[], None, None), None);
        assert_eq!(settle(&[bitmap("qmpbackup-5-c")], Some(5), Some(5)), None);
        assert_eq!(settle(&[bitmap("qmpbackup-c")], Some(5), None), None);
        // of another chain, or of somebody else
        assert_eq!(settle(&[bitmap("qmpbackup-4-d"), bitmap("mine")], Some(5), None), None);
        // nobody knows whose images these go back to
        assert_eq!(settle(&[bitmap("qmpbackup-4-c"), bitmap("qmpbackup-7-c")], Some(5), None), None);
        assert_eq!(settle(&[bitmap("qmpbackup-4-c")], None, None), None);
    }

    #[test]
    fn when_the_image_is_there_older_bitmaps_go() {
        let bitmaps = [bitmap("qmpbackup-4-c"), bitmap("qmpbackup-5-c"), bitmap("qmpbackup-c")];
        let remove = |name: &str| json!({"type": "block-dirty-bitmap-remove", "data": {"node": "disk", "name": name}});
        let expected = json!([remove("qmpbackup-c"), remove("qmpbackup-4-c")]);
        assert_eq!(settle(&bitmaps, Some(5), Some(5)), Some(expected));
        let used = Bitmap { busy: true, ..bitmap("qmpbackup-4-c") };
        assert_eq!(settle(&[used, bitmap("qmpbackup-5-c")], Some(5), Some(5)), None);
    }

    #[test]
    fn a_bitmap_whose_image_never_came_is_poured_into_the_one_before() {
        let expected = json!([
            {"type": "block-dirty-bitmap-merge",
             "data": {"node": "disk", "target": "qmpbackup-5-c", "bitmaps": ["qmpbackup-6-c"]}},
            {"type": "block-dirty-bitmap-remove", "data": {"node": "disk", "name": "qmpbackup-6-c"}},
        ]);
        assert_eq!(settle(&[bitmap("qmpbackup-5-c"), bitmap("qmpbackup-6-c")], Some(5), Some(6)), Some(expected));
        // a FULL that never came, and none before
        let expected = json!([
            {"type": "block-dirty-bitmap-remove", "data": {"node": "disk", "name": "qmpbackup-6-c"}},
        ]);
        assert_eq!(settle(&[bitmap("qmpbackup-6-c")], None, Some(6)), Some(expected));
    }

    #[test]
    fn nothing_is_poured_into_a_bitmap_that_lacks_writes() {
        let old = Bitmap { recording: false, ..bitmap("qmpbackup-5-c") };
        assert_eq!(settle(std::slice::from_ref(&old), Some(5), None), None);
        let remove = json!([{"type": "block-dirty-bitmap-remove", "data": {"node": "disk", "name": "qmpbackup-6-c"}}]);
        assert_eq!(settle(&[old, bitmap("qmpbackup-6-c")], Some(5), Some(6)), Some(remove));
    }

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Write(u8),
        /// Somebody else stops the bitmap of the newest image.
        Stop,
        /// It ends with its image or without, in order or as SIGKILL leaves it.
        Run {
            published: bool,
            settled: bool,
        },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let run = (any::<bool>(), any::<bool>()).prop_map(|(published, settled)| Step::Run { published, settled });
        prop::collection::vec(
            prop_oneof![4 => any::<u8>().prop_map(Step::Write), 1 => Just(Step::Stop), 4 => run],
            1..40,
        )
    }

    /// A disk: what each bitmap holds and whether it records; what was written since the newest image.
    #[derive(Default)]
    struct Model {
        bitmaps: BTreeMap<String, (BTreeSet<u8>, bool)>,
        newest: Option<i64>,
        since_newest: BTreeSet<u8>,
    }

    impl Model {
        fn bitmaps(&self) -> Vec<Bitmap> {
            self.bitmaps.iter().map(|(name, (_, recording))| Bitmap { recording: *recording, ..bitmap(name) }).collect()
        }

        fn settle(&mut self, ended: Option<i64>) {
            let Some(actions) = settle(&self.bitmaps(), self.newest, ended) else { return };
            for action in actions.as_array().unwrap() {
                let text = |key: &str| action["data"][key].as_str().map(str::to_owned).unwrap_or_default();
                match action["type"].as_str().unwrap() {
                    "block-dirty-bitmap-remove" => drop(self.bitmaps.remove(&text("name")).unwrap()),
                    "block-dirty-bitmap-merge" => {
                        for source in action["data"]["bitmaps"].as_array().unwrap() {
                            let poured = self.bitmaps[source.as_str().unwrap()].0.clone();
                            self.bitmaps.get_mut(&text("target")).unwrap().0.extend(poured);
                        }
                    }
                    other => panic!("{other}"),
                }
            }
        }

        fn write(&mut self, place: u8) {
            self.since_newest.insert(place);
            self.bitmaps.values_mut().filter(|(_, recording)| *recording).for_each(|(places, _)| {
                places.insert(place);
            });
        }
    }

    proptest! {
        #[test]
        fn no_write_is_lost_whatever_becomes_of_runs(steps in steps()) {
            let mut model = Model::default();
            let mut unsettled = None;
            for (step, time) in steps.into_iter().zip(1_i64..) {
                match step {
                    Step::Write(place) => model.write(place),
                    Step::Stop => {
                        let newest = model.newest.map(epoch);
                        if let Some(bitmap) = newest.and_then(|newest| model.bitmaps.get_mut(&newest)) {
                            bitmap.1 = false;
                        }
                    }
                    Step::Run { published, settled } => {
                        model.settle(unsettled.take());
                        model.bitmaps.insert(epoch(time), (BTreeSet::new(), true));
                        // between the bitmap and the moment
                        model.write(200);
                        let before = std::mem::take(&mut model.since_newest);
                        // while the jobs run
                        model.write(201);
                        if published {
                            model.newest = Some(time);
                        } else {
                            model.since_newest.extend(before);
                        }
                        unsettled = Some(time);
                        if settled {
                            model.settle(unsettled.take());
                        }
                    }
                }
                if let (None, Some(newest)) = (unsettled, model.newest) {
                    let (places, recording) = &model.bitmaps[&epoch(newest)];
                    // no INC follows one that does not record
                    prop_assert!(!recording || places.is_superset(&model.since_newest));
                    prop_assert_eq!(model.bitmaps.len(), 1);
                }
            }
        }
    }
}
