//! Every example loads without a finding, and what is made of it is taken by a proxy.

mod support;

use sheer_core::compile::{Source, compile};
use std::path::Path;

#[test]
fn every_example_loads() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let files = support::yaml_files(&directory);
    assert!(files.len() >= 4, "{files:?}");
    for path in files {
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let compiled = compile(&[Source { file, text }]);
        assert_eq!(compiled.diagnostics, [], "{}", path.display());
        assert!(!compiled.objects.is_empty());
        support::assemble(&support::lower(&compiled));
    }
}

/// What the reference shows can be pasted.
#[test]
fn every_block_of_the_reference_loads() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/configuration.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let blocks: Vec<&str> = text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(blocks.len() >= 5, "{}", blocks.len());
    for block in blocks {
        let compiled = compile(&[Source { file: "configuration.md".to_owned(), text: block.to_owned() }]);
        assert!(!compiled.has_errors(), "{:?}\n{block}", compiled.diagnostics);
        assert_eq!(compiled.objects.len(), 1);
    }
}
