//! YAML in, findings and wire resources out: one snapshot for each file in `tests/compile`.

mod support;

use proptest::prelude::*;
use sheer_core::compile::{All, Source, compile};
use std::fmt::Write as _;
use std::path::Path;

#[test]
fn snapshots() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compile");
    for path in support::yaml_files(&directory) {
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let compiled = compile(&[Source { file: file.clone(), text }]);
        let mut out = String::new();
        for diagnostic in &compiled.diagnostics {
            writeln!(out, "{diagnostic}").unwrap();
        }
        if !compiled.has_errors() {
            let all = support::lower(&compiled);
            support::assemble(&all);
            writeln!(out, "{}", print(&all)).unwrap();
        }
        insta::with_settings!({ snapshot_path => "compile", prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!(file.trim_end_matches(".yaml"), out);
        });
    }
}

/// The messages without the fields that have their default.
fn print(all: &All) -> String {
    let text = format!(
        "{:#?}\n{:#?}\n{:#?}\n{:#?}\n{:#?}",
        all.mesh,
        all.services.values().collect::<Vec<_>>(),
        all.endpoints.values().collect::<Vec<_>>(),
        all.routes.values().collect::<Vec<_>>(),
        all.workloads.values().collect::<Vec<_>>(),
    );
    let default =
        |line: &&str| [": \"\",", ": [],", ": 0,", ": false,", ": None,"].iter().any(|end| line.ends_with(end));
    text.lines().filter(|line| !default(line)).collect::<Vec<_>>().join("\n")
}

/// Texts that are cheap to write and might be dear to read.
#[test]
fn hostile_texts_end_in_a_short_finding() {
    let long = 200_000;
    let texts = [
        "[".repeat(long),
        "{".repeat(long),
        "- ".repeat(long),
        "? ".repeat(long),
        "a: ".repeat(long),
        "&a ".repeat(long),
        "*a ".repeat(long),
        "!a ".repeat(long),
        "\"".repeat(long),
        "'".repeat(long),
        "---\n".repeat(long),
        "%YAML 1.2\n".repeat(long / 10),
        "a:\n b:\n".repeat(long / 10),
        "- |\n".repeat(long / 10),
        format!("[{}", "a,".repeat(long)),
        format!("{{{}", "a: b,".repeat(long)),
        "\u{0}".repeat(long),
        "\t".repeat(long),
        " ".repeat(long),
        "\n".repeat(long),
        "#".repeat(long),
        (0..long / 10).map(|n| format!("k{n}: 1\n")).collect(),
        format!("a: &a [x]\nb: [{}]", "*a,".repeat(long)),
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {}}}\nspec: {{ports: [{{port: 80}}]}}",
            "a".repeat(1 << 20)
        ),
        format!("apiVersion: v1\nkind: {}", "a".repeat(1 << 20)),
        format!("apiVersion: {}\nkind: Mesh\nmetadata: {{name: m}}", "a".repeat(1 << 20)),
        "a".repeat(5 << 20),
    ];
    for text in texts {
        let start: String = text.chars().take(20).collect();
        let compiled = compile(&[Source { file: "x.yaml".to_owned(), text }]);
        assert!(compiled.diagnostics.len() <= 60, "{start:?}: {}", compiled.diagnostics.len());
        for diagnostic in compiled.diagnostics {
            let shown = diagnostic.to_string();
            assert!(shown.len() < 600 && !shown.chars().any(char::is_control), "{start:?}: {shown}");
        }
    }
}

/// Texts made of the words of the language, so that they reach the decoders.
fn nearly_configuration() -> impl Strategy<Value = String> {
    let words = prop::sample::select(vec![
        "apiVersion: ",
        "kind: ",
        "metadata: ",
        "spec: ",
        "name: ",
        "v1",
        "Service",
        "HTTPRoute",
        "Mesh",
        "Workload",
        "Enrollment",
        "gateway.networking.k8s.io/v1",
        "sheer.dev/v1alpha1",
        "{",
        "}",
        "[",
        "]",
        ", ",
        "\n",
        "  ",
        "    ",
        "- ",
        "---\n",
        "ports: ",
        "port: ",
        "80",
        "parentRefs: ",
        "rules: ",
        "matches: ",
        "backendRefs: ",
        "weight: ",
        "path: ",
        "value: ",
        "type: ",
        "RegularExpression",
        "(a+)+$",
        "\"",
        "'",
        ":",
        "#",
        "&a",
        "*a",
        "|",
        ">",
        "~",
        "true",
        "-1",
        "99999999999999999999",
        "methods: ",
        "token: ",
        "ttl: ",
        "10m",
        "é",
        "\u{202e}",
    ]);
    prop::collection::vec(words, 0..60).prop_map(|words| words.concat())
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,400}") {
        compile(&[Source { file: "x".to_owned(), text }]);
    }

    #[test]
    fn any_near_configuration_is_read_or_refused(text in nearly_configuration()) {
        let compiled = compile(&[Source { file: "x".to_owned(), text }]);
        if !compiled.has_errors() {
            support::assemble(&support::lower(&compiled));
        }
    }

    #[test]
    fn any_broken_example_is_read_or_refused(at in 0_usize..4000, byte in prop::char::any(), cut in 0_usize..40) {
        let text = include_str!("../../../examples/routes.yaml");
        let mut chars: Vec<char> = text.chars().collect();
        let at = at % chars.len();
        chars.drain(at..(at + cut).min(chars.len()));
        chars.insert(at.min(chars.len()), byte);
        compile(&[Source { file: "x".to_owned(), text: chars.into_iter().collect() }]);
    }
}
