//! A state file whose writing breaks off is the old one or the new one, wherever it breaks off and whatever the disk then
//! keeps of what was not flushed.

use sheer_proxy::state::Directory;
use sheer_simulation::disk::FileDisk;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

const OLD: &[u8] = b"what was there before";
const NEW: &[u8] = b"what is to be there from now on";

/// What a file's header takes: see `sheer_proxy::state`.
const HEADER: usize = 40;

fn on(disk: &Arc<FileDisk>) -> Directory {
    Directory::on(disk.clone(), Path::new("/state")).unwrap()
}

#[test]
fn a_write_that_breaks_off_at_any_byte_leaves_the_old_or_the_new() {
    let length = HEADER + NEW.len();
    let mut found = BTreeSet::new();
    for step in 0..=4 {
        // Only the first of the steps writes bytes.
        for written in 0..=if step == 0 { length } else { 0 } {
            for names in [false, true] {
                for kept in 0..=length {
                    let disk = Arc::new(FileDisk::default());
                    on(&disk).save("x", OLD).unwrap();
                    disk.fail_after(step, written);
                    let saved = on(&disk).save("x", NEW);
                    assert_eq!(saved.is_ok(), step == 4, "a save has four steps");
                    disk.lose(names, |length| kept.min(length));
                    let place = format!("step {step}, {written} bytes written, names {names}, {kept} bytes kept");
                    let content = on(&disk).load("x").unwrap_or_else(|error| panic!("{place}: {error}"));
                    let is_new = content.as_deref() == Some(NEW);
                    assert!(is_new || content.as_deref() == Some(OLD), "{place}: {content:?}");
                    assert!(is_new || saved.is_err(), "{place}: it was saved, and is not there");
                    found.insert(is_new);
                    // What was left lying there is in nobody's way.
                    on(&disk).save("x", b"the next").unwrap();
                    assert_eq!(on(&disk).load("x").unwrap().as_deref(), Some(&b"the next"[..]), "{place}");
                }
            }
        }
    }
    assert_eq!(found.len(), 2, "both were met");
}
