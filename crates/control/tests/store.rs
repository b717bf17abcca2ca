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
    // More in the long form (`make faults`).
    let rounds = if std::env::var_os("FAULTS_LONG").is_some() { 500_u64 } else { 12 };
    let mut writes = 0;
    for round in 0..rounds {
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
            if number % 13 >= round % 13 {
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
        writes = stored;
    }
    note(rounds, writes);
}

/// A line for docs/reliability.md, where it is being written.
fn note(rounds: u64, writes: u64) {
    let Some(path) = std::env::var_os("FAULTS_REPORT") else { return };
    let line = serde_json::json!({
        "row": "F5",
        "done": format!("kill -9 of whoever writes to the store, {rounds} times"),
        "bar": "0 acknowledged writes lost",
        "seen": format!("{writes} writes, none lost"),
        "verdict": "holds",
    });
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
    writeln!(file, "{line}").unwrap();
}
