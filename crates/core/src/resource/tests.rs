use super::*;
use rstest::rstest;

fn findings(text: &str) -> Vec<String> {
    let mut diagnostics = Vec::new();
    read("f", text, &mut diagnostics);
    diagnostics.iter().map(ToString::to_string).collect()
}

#[rstest]
#[case("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: 1}]}")]
#[case(r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": [{"port": 1}]}}"#)]
#[case(
    "\u{feff}# comment\n---\napiVersion: v1\nkind: Service\nmetadata:\n  name: a\n  namespace:\nspec:\n  ports:\n  - port: 1\n...\n"
)]
#[case("apiVersion: v1\r\nkind: Service\r\nmetadata: {name: a}\r\nspec: {ports: [{port: 1}]}\r\n")]
fn spellings_of_one_service(#[case] text: &str) {
    assert_eq!(findings(text), Vec::<String>::new());
    let file = read("f", text, &mut Vec::new());
    assert!(file.whole);
    assert_eq!(file.documents.len(), 1);
    assert_eq!(file.documents[0].resource.as_ref().unwrap().meta().name.to_string(), "default/a");
}

#[rstest]
#[case("a: &x 1", "f:1:4: error: anchors (&name) are not allowed; write the value out where it is used")]
#[case("a: !!str 1", "f:1:4: error: tags (!name) are not allowed; remove the tag")]
#[case("<<: {}", "f:1:1: error: merge keys (<<) are not allowed; write the fields out")]
#[case("{a: 1, a: 2}", "f:1:8: error: the key 'a' stands twice in this map; remove one of the two")]
#[case("? [a]\n: b", "f:1:3: error: a key must be a text; write 'name: value'")]
fn what_yaml_has_and_a_configuration_has_not(#[case] text: &str, #[case] finding: &str) {
    assert_eq!(findings(text), [finding]);
}

#[test]
fn nesting_is_bounded() {
    let text = "[".repeat(yaml::MAX_DEPTH + 1);
    assert_eq!(
        findings(&text),
        ["f:1:33: error: nested more than 32 levels deep; no resource needs that; check the brackets"]
    );
}

#[test]
fn a_name_of_a_megabyte_is_one_short_line() {
    let name = "x".repeat(1 << 20);
    let found =
        findings(&format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 1}}]}}"));
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("f:3:18: error: metadata.name: 'xxxx") && found[0].len() < 300, "{}", found[0]);
    assert!(found[0].contains("(1048576 bytes) is no name"), "{}", found[0]);
}

#[test]
fn findings_of_one_document_are_bounded() {
    let fields: String = (0..1000).map(|number| format!("x{number}: 1\n")).collect();
    let found = findings(&format!("apiVersion: v1\nkind: Service\n{fields}"));
    assert_eq!(found.len(), 51);
    assert!(found[50].ends_with("952 more findings in this document"), "{}", found[50]);
}

#[test]
fn documents_keep_their_own_text() {
    let text = "# first\nkind: A\n---\n# empty\n---\nkind: B # second\n--- # third\nkind: C\n...\n";
    let texts: Vec<String> = read("f", text, &mut Vec::new()).documents.into_iter().map(|it| it.text).collect();
    assert_eq!(texts.len(), 3);
    assert_eq!(texts[0], "# first\nkind: A\n");
    assert_eq!(texts[1], "kind: B # second\n");
    assert!(texts[2].ends_with("kind: C\n"), "{:?}", texts[2]);
}

#[test]
fn kinds_are_found_as_people_type_them() {
    for (text, kind) in [
        ("service", Kind::Service),
        ("Services", Kind::Service),
        ("httproute", Kind::HttpRoute),
        ("HTTPRoutes", Kind::HttpRoute),
        ("mesh", Kind::Mesh),
        ("meshes", Kind::Mesh),
        ("enrollments", Kind::Enrollment),
    ] {
        assert_eq!(Kind::parse(text), Some(kind), "{text}");
    }
    assert_eq!(Kind::parse("pod"), None);
}
