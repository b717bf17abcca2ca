//! The store survives being killed at any moment: a child writes and says what was acknowledged, the parent kills it.

use sheer_control::store::{Store, StoreError, Table};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

const DIRECTORY: &str = "SHEER_TEST_STORE";

/// Not a test of its own: what the child runs.
#[test]
fn child() {
    let Ok(directory) = std::env::var(DIRECTORY) else { return };
    let store = Store::open(Path::new(&directory)).unwrap();
    let mut out = std::io::stdout();
    for number in store.read::<u64>(Table::Pins, "last").unwrap().unwrap_or(0) + 1.. {
        let written = store.write_now::<_, StoreError>(move |transaction| {
            transaction.put(Table::Pins, &format!("n{number}"), &number)?;
            transaction.put(Table::Pins, "last", &number)
        });
        written.unwrap();
        writeln!(out, "acknowledged {number}").unwrap();
        out.flush().unwrap();
    }
}

#[test]
fn what_was_acknowledged_survives_kill() {
    let directory = tempfile::tempdir().unwrap();
    for round in 0..12_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--nocapture"])
            .env(DIRECTORY, directory.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let acknowledged = lines
            .map_while(Result::ok)
            .filter_map(|line| line.rsplit_once("acknowledged ").and_then(|(_, number)| number.parse::<u64>().ok()));
        // Killed after a different number of writes each time, in the middle of the next.
        let mut last = 0;
        for number in acknowledged {
            last = number;
            if number % 13 >= round {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(last > 0, "round {round}: nothing was acknowledged");
        let store = Store::open(directory.path()).unwrap();
        let stored = store.read::<u64>(Table::Pins, "last").unwrap().unwrap();
        assert!(stored >= last, "round {round}: {stored} is stored, {last} was acknowledged");
        for number in 1..=stored {
            assert_eq!(store.read::<u64>(Table::Pins, &format!("n{number}")).unwrap(), Some(number));
        }
    }
}
