//! Who gets a certificate, and what they are told who do not.

use crate::Fixture;
use crate::client::{self, Credentials, Name, certify, connect_tls, join};
use sheer_core::api::TokenRequest;
use sheer_core::token::JoinToken;
use sheer_core::wire::v1;
use tonic::Code;

fn parsed(token: &str) -> (std::net::SocketAddr, [u8; 32]) {
    let token = JoinToken::parse(token).unwrap();
    (token.addresses[0].parse().unwrap(), token.root_sha256)
}

#[tokio::test]
async fn a_token_joins_once_and_its_key_again() {
    let mesh = Fixture::start().await;
    let token = mesh.token("web").await;
    let name = Name::new("web", "web-1");
    let (address, root) = parsed(&token);
    let channel = connect_tls(address, root, None).await.unwrap();
    let mut credentials = Credentials::new();
    let response = certify(&channel, &mut credentials, &name, &token).await.unwrap();
    assert_eq!(response.uid, "local/host/default/web-1");
    assert_eq!(response.control, [address.to_string()]);
    assert_eq!(response.mesh.unwrap().trust_domain, "mesh.internal");
    assert_eq!(response.trust.unwrap().roots.len(), 1);
    // The answer was lost on the way: the same key asks again.
    certify(&channel, &mut credentials, &name, &token).await.unwrap();
    let other = certify(&channel, &mut Credentials::new(), &name, &token).await.unwrap_err();
    assert_eq!(other.code(), Code::Unauthenticated);
    assert!(other.message().contains("already used by 1 other key"), "{other}");
}

#[tokio::test]
async fn two_hundred_join_at_once_with_one_token() {
    let enrollment = "apiVersion: sheer.dev/v1alpha1\nkind: Enrollment\nmetadata: {name: fleet}\nspec:\n  methods: \
                      [{token: {ttl: 1h, uses: 200}}]\n  serviceAccounts: [web]\n";
    let mesh = Fixture::with_config(&[("fleet.yaml", enrollment)]).await;
    let request = TokenRequest {
        namespace: "default".into(),
        service_account: "web".into(),
        ttl_s: 3600,
        uses: 200,
        from: vec![],
        control: vec![],
    };
    let token = mesh.plane.control().create_token(&request).await.unwrap().token;
    let joins = (0..200).map(|number| {
        let token = token.clone();
        tokio::spawn(async move { join(&token, &Name::new("web", &format!("web-{number}"))).await.map(|_| ()) })
    });
    for joined in futures::future::join_all(joins).await {
        joined.unwrap().unwrap();
    }
    let late = join(&token, &Name::new("web", "web-late")).await.err().unwrap();
    assert!(late.message().contains("already used by 200"), "{late}");
}

#[tokio::test]
async fn every_refused_token_says_why() {
    let mesh = Fixture::start().await;
    let token = mesh.token("web").await;
    let (address, root) = parsed(&token);
    let channel = connect_tls(address, root, None).await.unwrap();
    let ask = async |token: &str, account: &'static str| {
        certify(&channel, &mut Credentials::new(), &Name::new(account, "web-1"), token).await.unwrap_err()
    };

    let nothing = ask("", "web").await;
    assert!(nothing.message().contains("sheer token create -n default --service-account web"), "{nothing}");
    let cut = ask(&token[..60], "web").await;
    assert!(cut.message().contains("incomplete or damaged"), "{cut}");
    let mut wrong = JoinToken::parse(&token).unwrap();
    wrong.secret[0] ^= 1;
    assert!(ask(&wrong.encode(), "web").await.message().contains("secret is wrong"));
    let other = ask(&token, "db").await;
    assert_eq!(other.code(), Code::PermissionDenied);
    assert!(other.message().contains("is for default/web, not for default/db"), "{other}");

    let elsewhere = Fixture::start().await;
    let foreign = elsewhere.token("web").await;
    let refused = ask(&foreign, "web").await;
    assert!(refused.message().contains("not one of this control plane's"), "{refused}");
    // The joining side does not even talk to a control plane that is not the token's.
    assert!(connect_tls(address, parsed(&foreign).1, None).await.is_err());

    mesh.advance(660);
    let late = ask(&token, "web").await;
    assert!(late.message().contains("expired"), "{late}");
}

#[tokio::test]
async fn guessing_is_slowed_down() {
    let mesh = Fixture::start().await;
    let token = mesh.token("web").await;
    let (address, root) = parsed(&token);
    let channel = connect_tls(address, root, None).await.unwrap();
    let mut wrong = JoinToken::parse(&token).unwrap();
    let mut last = None;
    for guess in 0..20_u8 {
        wrong.secret[0] = wrong.secret[0].wrapping_add(guess | 1);
        let name = Name::new("web", "web-1");
        last = Some(certify(&channel, &mut Credentials::new(), &name, &wrong.encode()).await.unwrap_err());
    }
    assert_eq!(last.unwrap().code(), Code::ResourceExhausted);
}

#[tokio::test]
async fn without_a_certificate_only_certify_answers() {
    let mesh = Fixture::start().await;
    let token = mesh.token("web").await;
    let (address, root) = parsed(&token);
    let channel = connect_tls(address, root, None).await.unwrap();
    let name = Name::new("web", "web-1");
    let refused = client::attach(&channel, client::registration(&name, "default/web")).await.err().unwrap();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let refused = client::Discovery::open(&channel, "").await.err().unwrap();
    assert_eq!(refused.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_certificate_renews_itself_also_when_it_ended_a_while_ago() {
    let mesh = Fixture::start().await;
    let token = mesh.token("web").await;
    let (address, root) = parsed(&token);
    let name = Name::new("web", "web-1");
    let (channel, mut credentials) = join(&token, &name).await.unwrap();
    let first = credentials.chain[0].clone();
    certify(&channel, &mut credentials, &name, "").await.unwrap();
    assert_ne!(first, credentials.chain[0]);
    let as_other = certify(&channel, &mut Credentials::new(), &Name::new("db", "db-1"), "").await.unwrap_err();
    assert_eq!(as_other.code(), Code::PermissionDenied);

    // A day and twelve hours asleep.
    mesh.advance(36 * 3600);
    let channel = connect_tls(address, root, Some(&credentials)).await.unwrap();
    let refused = client::attach(&channel, client::registration(&name, "default/web")).await.err().unwrap();
    assert!(refused.message().contains("renew it"), "{refused}");
    let mut another_key = Credentials::new();
    let refused = certify(&channel, &mut another_key, &name, "").await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    certify(&channel, &mut credentials, &name, "").await.unwrap();
    let channel = connect_tls(address, root, Some(&credentials)).await.unwrap();
    client::attach(&channel, client::registration(&name, "default/web")).await.unwrap();

    // Longer than a day after its end there is no grace.
    mesh.advance(50 * 3600);
    let channel = connect_tls(address, root, Some(&credentials)).await;
    let renewed = match &channel {
        Ok(channel) => certify(channel, &mut credentials, &name, "").await.err(),
        Err(_) => None,
    };
    assert!(channel.is_err() || renewed.is_some());
}

#[tokio::test]
async fn a_new_name_does_not_shake_off_the_limits_of_its_enrollment() {
    let enrollment = "apiVersion: sheer.dev/v1alpha1\nkind: Enrollment\nmetadata: {name: fleet}\nspec:\n  methods: \
                      [{token: {ttl: 1h, uses: 2}}]\n  serviceAccounts: [web]\n  ports: [\"*\"]\n";
    let mesh = Fixture::with_config(&[("fleet.yaml", enrollment)]).await;
    let request = TokenRequest {
        namespace: "default".into(),
        service_account: "web".into(),
        ttl_s: 3600,
        uses: 2,
        from: vec![],
        control: vec![],
    };
    let token = mesh.plane.control().create_token(&request).await.unwrap().token;
    let (address, root) = parsed(&token);
    let (channel, mut credentials) = join(&token, &Name::new("web", "web-1")).await.unwrap();
    let old = connect_tls(address, root, Some(&credentials)).await.unwrap();
    certify(&channel, &mut credentials, &Name::new("web", "web-1"), "").await.unwrap();
    // Also with a certificate that a renewal has replaced.
    for (channel, name) in [(channel, "web-2"), (old, "web-3")] {
        let name = Name::new("web", name);
        certify(&channel, &mut Credentials::new(), &name, "").await.unwrap();
        let registration = client::registration(&name, "default/ledger");
        let mut attached = client::attach(&channel, registration).await.unwrap();
        match attached.notice().await {
            v1::control_notice::Body::Refused(refused) => assert!(refused.reason.contains("fleet"), "{refused:?}"),
            other => panic!("{other:?}"),
        }
    }
}

/// Asks over the unix socket for an identity in namespace `other`.
async fn certify_elsewhere(mesh: &Fixture) -> Result<v1::CertifyResponse, tonic::Status> {
    let csr = rcgen::CertificateParams::default().serialize_request(&rcgen::KeyPair::generate().unwrap()).unwrap();
    let request = v1::CertifyRequest {
        csr: csr.der().to_vec().into(),
        namespace: "other".into(),
        service_account: "web".into(),
        workload: "web-1".into(),
        ..Default::default()
    };
    let mut grpc = tonic::client::Grpc::new(mesh.unix().await);
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<v1::CertifyRequest, v1::CertifyResponse>::default();
    let path = "/sheer.v1.Identity/Certify".parse().unwrap();
    grpc.unary(tonic::Request::new(request), path, codec).await.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn the_unix_socket_knows_its_own_user() {
    let mesh = Fixture::start().await;
    let channel = mesh.unix().await;
    certify(&channel, &mut Credentials::new(), &Name::new("web", "web-1"), "").await.unwrap();
    let refused = certify_elsewhere(&mesh).await.unwrap_err();
    assert!(refused.message().contains("methods: [{local: {users: ["), "{refused}");
}

#[tokio::test]
async fn an_enrollment_lets_a_user_of_this_host_be_somebody_else() {
    let user = nix::unistd::geteuid();
    let enrollment = |users: &str| {
        format!(
            "apiVersion: sheer.dev/v1alpha1\nkind: Enrollment\nmetadata: {{name: hosts, namespace: other}}\nspec:\n  \
             methods: [{{local: {{users: [{users}]}}}}]\n  serviceAccounts: [web]\n"
        )
    };
    let mesh = Fixture::with_config(&[("a.yaml", &enrollment(&user.to_string()))]).await;
    assert_eq!(certify_elsewhere(&mesh).await.unwrap().uid, "local/host/other/web-1");
    let mesh = Fixture::with_config(&[("a.yaml", &enrollment("4000000000"))]).await;
    assert_eq!(certify_elsewhere(&mesh).await.unwrap_err().code(), Code::PermissionDenied);
}
