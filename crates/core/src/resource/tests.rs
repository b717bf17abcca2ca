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

fn one(text: &str) -> Resource {
    let mut diagnostics = Vec::new();
    let file = read("f", text, &mut diagnostics);
    assert!(diagnostics.is_empty(), "{diagnostics:?}");
    file.documents.into_iter().next().unwrap().resource.unwrap()
}

#[test]
fn an_enrollment_grants_what_it_names() {
    let Resource::Enrollment(it) = one(r#"
apiVersion: sheer.dev/v1alpha1
kind: Enrollment
metadata: {name: e}
spec:
  methods: [{token: {from: [10.0.0.0/8, 192.0.2.1]}}, {local: {users: [0, 1000]}}]
  serviceAccounts: [web, api]
  labels: {version: ["*"], app: [web]}
  ports: [8080]
  addresses: [10.7.0.0/16]
"#)
    else {
        panic!("another kind");
    };
    let label = |text: &str| crate::name::DnsLabel::parse(text).unwrap();
    let from = vec!["10.0.0.0/8".parse().unwrap(), "192.0.2.1/32".parse().unwrap()];
    assert_eq!(it.methods[0], Method::Token { ttl: DEFAULT_TOKEN_TTL, uses: 1, from });
    assert_eq!(it.methods[1], Method::Local { users: vec![0, 1000] });
    assert!(it.service_accounts.admits(&label("api")) && !it.service_accounts.admits(&label("db")));
    assert!(it.admits_service(&label("web"), &label("web")) && !it.admits_service(&label("web"), &label("api")));
    assert!(it.admits_label("version", "v9") && it.admits_label("app", "web"));
    assert!(!it.admits_label("app", "api") && !it.admits_label("team", "x"));
    assert!(it.ports.admits(&8080) && !it.ports.admits(&80));
    let address = |text: &str| text.parse().unwrap();
    assert!(it.admits_address(address("198.51.100.1"), address("198.51.100.1")));
    assert!(it.admits_address(address("198.51.100.1"), address("10.7.3.4")));
    assert!(!it.admits_address(address("198.51.100.1"), address("10.8.0.1")));
}

#[test]
fn a_service_is_what_was_written() {
    let Resource::Service(it) = one(r#"
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, annotations: {sheer.dev/service-accounts: "b, a,b"}}
spec:
  ports: [{name: one, port: 80, targetPort: web, appProtocol: kubernetes.io/h2c}, {name: two, port: 81}]
"#)
    else {
        panic!("another kind");
    };
    assert_eq!(it.meta.name.to_string(), "shop/web");
    assert_eq!(it.accounts.iter().map(ToString::to_string).collect::<Vec<_>>(), ["a", "b"]);
    let protocol = crate::wire::v1::Protocol::Http2;
    assert_eq!(it.ports[0], ServicePort { port: 80, name: "one".into(), target: Target::Name("web".into()), protocol });
    assert_eq!(it.ports[1].target, Target::Number(81));
}
