//! The kept corpus as an ordinary test.

use std::fs;
use std::path::{Path, PathBuf};

/// So many mutations a target are played, in the same order each time.
const MUTATIONS: usize = 2_000;

/// Mutations stay below this, so that a test takes about a second.
const MAX_BYTES: usize = 4 * 1024;

/// Plays a target's corpus (`fuzz/corpus/NAME`), what it once failed at (`fuzz/crashes/NAME`), and mutations of these.
///
/// # Panics
/// When the target does; what it was given is printed. Also when there is no corpus.
pub fn replay(name: &str, target: impl Fn(&[u8])) {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let mut inputs = files(&fuzz.join("corpus").join(name));
    assert!(!inputs.is_empty(), "fuzz/corpus/{name} is empty");
    inputs.extend(files(&fuzz.join("crashes").join(name)));
    for (path, input) in &inputs {
        play(&path.display().to_string(), input, &target);
    }
    let mut dice = Dice(0x5eed);
    for count in 0..MUTATIONS {
        let input = mutated(&inputs, &mut dice);
        play(&format!("mutation {count}"), &input, &target);
    }
}

/// The files of a directory, by name; none where there is no directory.
fn files(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut files: Vec<_> = entries
        .map(|entry| {
            let path = entry.expect("a readable directory").path();
            let content = fs::read(&path).expect("a readable file");
            (path, content)
        })
        .collect();
    files.sort();
    files
}

fn play(what: &str, input: &[u8], target: &impl Fn(&[u8])) {
    struct Tell<'a>(&'a str, &'a [u8]);
    impl Drop for Tell<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("the input was {}: b\"{}\"", self.0, self.1.escape_ascii());
            }
        }
    }
    let _tell = Tell(what, input);
    target(input);
}

/// An input with one to four changes, each of a kind that finds something in parsers.
fn mutated(inputs: &[(PathBuf, Vec<u8>)], dice: &mut Dice) -> Vec<u8> {
    let mut input = inputs[dice.below(inputs.len())].1.clone();
    input.truncate(MAX_BYTES);
    for _ in 0..=dice.below(4) {
        let at = dice.below(input.len() + 1);
        let end = (at + dice.below(8)).min(input.len());
        match dice.below(7) {
            0 if at < input.len() => input[at] ^= 1 << dice.below(8),
            1 if at < input.len() => input[at] = dice.one_of(b"\0\x01\x7f\x80\xff\r\n \t:;,/.%\"0"),
            2 => input.insert(at, dice.one_of(b"\0\xff\r\n \t:;,/.%\"0")),
            3 => drop(input.drain(at..end)),
            4 => {
                let again = input[at..end].to_vec();
                input.splice(at..at, again);
            }
            5 => input.truncate(at),
            _ => {
                let other = &inputs[dice.below(inputs.len())].1;
                let from = dice.below(other.len() + 1);
                let to = (from + dice.below(64)).min(other.len());
                input.splice(at..end, other[from..to].iter().copied());
            }
        }
    }
    input
}

/// Numbers that look random and are the same in every run (xorshift, after Marsaglia).
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % end as u64).unwrap_or_default()
    }

    fn one_of(&mut self, values: &[u8]) -> u8 {
        values[self.below(values.len())]
    }
}
