use super::zone::tests::service;
use super::*;
use hickory_proto::op::Query;
use proptest::prelude::*;
use rstest::rstest;
use std::net::Ipv4Addr;

fn zone() -> Arc<ArcSwap<Zone>> {
    let services = [service("default/api", &["api.example.com"], &["240.0.0.1", "fd00::1"])];
    Arc::new(ArcSwap::from_pointee(Zone::new("mesh.internal", "default", &services)))
}

fn server(resolvers: Vec<SocketAddr>) -> Arc<Server> {
    Server::new(zone(), resolvers, Arc::default())
}

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

async fn ask(server: &Arc<Server>, message: &Message) -> Message {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let task = tokio::spawn(server.clone().serve_udp(socket, drain::channel().1));
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.connect(address).await.unwrap();
    client.send(&message.to_vec().unwrap()).await.unwrap();
    let mut buffer = [0; 4096];
    let length = client.recv(&mut buffer).await.unwrap();
    task.abort();
    Message::from_vec(&buffer[..length]).unwrap()
}

#[rstest]
#[case("api.default.svc.mesh.internal.", RecordType::A, ResponseCode::NoError, 1)]
#[case("api.default.svc.mesh.internal.", RecordType::AAAA, ResponseCode::NoError, 1)]
#[case("api.default.svc.mesh.internal.", RecordType::ANY, ResponseCode::NoError, 2)]
#[case("api.default.svc.mesh.internal.", RecordType::TXT, ResponseCode::NoError, 0)]
#[case("aPi.DeFault.svc.mesh.INTERNAL.", RecordType::A, ResponseCode::NoError, 1)]
#[case("api.example.com.", RecordType::A, ResponseCode::NoError, 1)]
#[case("default.svc.mesh.internal.", RecordType::A, ResponseCode::NoError, 0)]
#[case("api.other.svc.mesh.internal.", RecordType::A, ResponseCode::NXDomain, 0)]
#[tokio::test]
async fn names_of_the_mesh(
    #[case] name: &str,
    #[case] kind: RecordType,
    #[case] code: ResponseCode,
    #[case] records: usize,
) {
    let answer = ask(&server(vec![]), &question(name, kind)).await;
    assert_eq!((answer.metadata.response_code, answer.answers.len()), (code, records));
    assert_eq!(answer.metadata.id, 4711);
    assert!(answer.metadata.authoritative && answer.metadata.recursion_desired);
    // The name comes back letter by letter as it was asked.
    assert!(answer.queries[0].name().eq_case(&Name::from_ascii(name).unwrap()));
    assert!(answer.answers.iter().all(|it| it.ttl == TTL_S));
    assert_eq!(answer.authorities.len(), usize::from(records == 0), "a negative answer says how long it holds");
}

#[tokio::test]
async fn what_cannot_be_answered_is_said_so() {
    let server = server(vec![]);
    let mut update = question("mesh.internal.", RecordType::A);
    update.metadata.op_code = OpCode::Notify;
    assert_eq!(ask(&server, &update).await.metadata.response_code, ResponseCode::NotImp);
    let foreign = question("example.org.", RecordType::A);
    assert_eq!(ask(&server, &foreign).await.metadata.response_code, ResponseCode::ServFail);
    let mut two = question("api.example.com.", RecordType::A);
    two.add_query(Query::query(Name::from_ascii("b.").unwrap(), RecordType::A));
    assert_eq!(ask(&server, &two).await.metadata.response_code, ResponseCode::FormErr);
    let mut edns = question("api.example.com.", RecordType::A);
    edns.set_edns(Edns::new());
    assert_eq!(ask(&server, &edns).await.edns.map(|it| it.max_payload()), Some(MAX_UDP_ANSWER));
}

/// A resolver that answers every question with one address, by UDP truncated when told so.
async fn resolver(truncate: bool, code: ResponseCode) -> SocketAddr {
    let (udp, tcp) = loop {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
            break (udp, tcp);
        }
    };
    let address = udp.local_addr().unwrap();
    let answer = move |question: &[u8], truncate: bool| {
        let query = Message::from_vec(question).unwrap();
        let mut answer = empty(&query, code);
        answer.metadata.truncation = truncate;
        if !truncate {
            let name = query.queries[0].name().clone();
            answer.add_answer(Record::from_rdata(name, 60, RData::A(A(Ipv4Addr::new(192, 0, 2, 1)))));
        }
        answer.to_vec().unwrap()
    };
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        loop {
            let (length, client) = udp.recv_from(&mut buffer).await.unwrap();
            // A forged answer first: it must be ignored.
            let mut forged = answer(&buffer[..length], truncate);
            forged[0] ^= 0xff;
            udp.send_to(&forged, client).await.unwrap();
            udp.send_to(&answer(&buffer[..length], truncate), client).await.unwrap();
        }
    });
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = tcp.accept().await.unwrap();
            let length = stream.read_u16().await.unwrap();
            let mut question = vec![0; usize::from(length)];
            stream.read_exact(&mut question).await.unwrap();
            let answer = answer(&question, false);
            stream.write_u16(u16::try_from(answer.len()).unwrap()).await.unwrap();
            stream.write_all(&answer).await.unwrap();
        }
    });
    address
}

#[tokio::test]
async fn other_names_are_asked_of_the_hosts_resolvers() {
    let server = server(vec![resolver(false, ResponseCode::NoError).await]);
    let answer = ask(&server, &question("ExAmple.org.", RecordType::A)).await;
    assert_eq!(answer.metadata.id, 4711);
    assert_eq!(answer.answers.len(), 1);
    assert_eq!(answer.answers[0].ttl, 60);
    assert!(!answer.metadata.authoritative);
}

#[tokio::test]
async fn a_truncated_answer_is_fetched_whole_by_tcp() {
    let server = server(vec![resolver(true, ResponseCode::NoError).await]);
    let answer = ask(&server, &question("example.org.", RecordType::A)).await;
    assert_eq!((answer.metadata.truncation, answer.answers.len()), (false, 1));
}

#[tokio::test]
async fn a_failing_resolver_is_passed_over_and_remembered() {
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let resolvers =
        vec![silent, resolver(false, ResponseCode::ServFail).await, resolver(false, ResponseCode::NoError).await];
    let server = server(resolvers);
    for name in ["example.org.", "example.com."] {
        let answer = ask(&server, &question(name, RecordType::A)).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    }
}

#[tokio::test]
async fn tcp_answers_several_questions_in_order() {
    let server = server(vec![resolver(false, ResponseCode::NoError).await]);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(server.serve_tcp(listener, drain::channel().1));
    let mut stream = TcpStream::connect(address).await.unwrap();
    for name in ["api.default.svc.mesh.internal.", "example.org.", "none.svc.mesh.internal."] {
        let question = question(name, RecordType::A).to_vec().unwrap();
        stream.write_u16(u16::try_from(question.len()).unwrap()).await.unwrap();
        stream.write_all(&question).await.unwrap();
    }
    let mut counts = vec![];
    for _ in 0..3 {
        let length = stream.read_u16().await.unwrap();
        let mut answer = vec![0; usize::from(length)];
        stream.read_exact(&mut answer).await.unwrap();
        counts.push(Message::from_vec(&answer).unwrap().answers.len());
    }
    assert_eq!(counts, [1, 1, 0]);
}

#[test]
fn an_answer_is_never_answered() {
    let mut message = question("api.default.svc.mesh.internal.", RecordType::A);
    message.metadata.message_type = MessageType::Response;
    assert!(matches!(server(vec![]).decide(&message.to_vec().unwrap(), Transport::Udp), Decision::Ignore));
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes: Vec<u8>) {
        let server = server(vec![]);
        let _ = server.decide(&bytes, Transport::Udp);
    }

    #[test]
    fn no_change_of_a_question_panics(at in 0usize..60, byte: u8, cut in 0usize..60) {
        let server = server(vec![]);
        let mut edns = question("api.default.svc.mesh.internal.", RecordType::A);
        edns.set_edns(Edns::new());
        let mut bytes = edns.to_vec().unwrap();
        let length = bytes.len();
        bytes[at % length] = byte;
        let _ = server.decide(&bytes, Transport::Udp);
        let _ = failure(&bytes);
        let _ = server.decide(&bytes[..cut % length], Transport::Udp);
    }
}
