//! The command lines under `deploy/` are understood by the binary that they start.

use std::path::{Path, PathBuf};
use std::process::Command;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy")
}

/// Lets the binary read a command line and print what it understood, without doing anything.
fn understood(line: &[String]) {
    let settings = tempfile::NamedTempFile::with_suffix(".yaml").expect("a file");
    let mut words = vec!["--print-settings".to_owned()];
    let mut given = line.iter();
    while let Some(word) = given.next() {
        words.push(word.clone());
        if word == "--settings" {
            given.next();
            words.push(settings.path().display().to_string());
        }
    }
    let output = Command::new(env!("CARGO_BIN_EXE_sheer")).args(&words).output().expect("run sheer");
    assert!(output.status.success(), "{line:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn units_start_what_exists() {
    let mut lines = 0;
    for entry in std::fs::read_dir(deploy().join("systemd")).expect("deploy/systemd") {
        let unit = std::fs::read_to_string(entry.expect("an entry").path()).expect("a unit");
        for line in unit.lines().filter_map(|line| line.strip_prefix("ExecStart=/usr/local/bin/sheer ")) {
            let words: Vec<String> = line.replace("%i", "web").split(' ').map(str::to_owned).collect();
            understood(&words);
            lines += 1;
        }
    }
    assert_eq!(lines, 3);
}

#[test]
fn containers_start_what_exists() {
    let compose = std::fs::read_to_string(deploy().join("compose.yaml")).expect("deploy/compose.yaml");
    let commands: Vec<_> = compose.lines().filter_map(|line| line.trim().strip_prefix("command: ")).collect();
    assert_eq!(commands.len(), 2);
    for command in commands {
        understood(&serde_json::from_str::<Vec<String>>(command).expect("a list of words"));
    }
}
