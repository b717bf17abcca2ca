use super::forward;
use super::kept::{self, Kept};
use super::zone::{Lookup, Zone};
use super::{Decision, MAX_QUESTION, Server, Transport, failure};
use arc_swap::ArcSwap;
use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::RecordType;
use sheer_core::name::ServiceName;
use sheer_core::snapshot::Service;
use sheer_fuzzing::Choices;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

const HEADER: usize = 12;

static SERVER: LazyLock<Arc<Server>> = LazyLock::new(|| {
    let name = ServiceName::parse("default/api").expect("a name");
    let hosts = vec![name.host("mesh.internal").into(), "api.example.com".into()];
    let addresses = vec!["240.0.0.1".parse().expect("an address"), "fd00::1".parse().expect("an address")];
    let service = Service { name, hosts, addresses, ports: Vec::new() };
    let zone = Zone::new("mesh.internal", "default", [&service]);
    Server::new(Arc::new(ArcSwap::from_pointee(zone)), Vec::new(), Arc::default())
});

/// Whatever arrives at the name server's socket: it is answered as its zone says, or passed on, or not at all; no answer
/// is itself answered, none belongs to another question, and none is much larger than what was asked.
///
/// # Panics
/// When that does not hold.
pub fn question(input: &[u8]) {
    let input = &input[..input.len().min(MAX_QUESTION)];
    for transport in [Transport::Udp, Transport::Tcp] {
        match SERVER.decide(input, transport) {
            Decision::Ignore => assert!(
                input.len() < HEADER || input[2] & 0x80 != 0,
                "somebody who asked is not answered: {}",
                input.escape_ascii()
            ),
            Decision::Answer(answer) => {
                assert!(!matches!(SERVER.decide(&answer, transport), Decision::Answer(_)), "two servers talk for ever");
                belongs(&answer, input);
                // Two addresses, a start of authority, EDNS.
                assert!(answer.len() <= input.len().max(HEADER) + 200, "{} for {}", answer.len(), input.len());
                is_true(&answer, input);
            }
            Decision::Forward { largest } => {
                assert!(largest >= 512 && input.len() >= HEADER);
                let failed = failure(input);
                belongs(&failed, input);
                assert!(failed.len() <= input.len() + 11, "{} for {}", failed.len(), input.len());
                assert!(forward::is_failure(&failed));
                let query = Message::from_vec(input).expect("what is passed on was read");
                if let Some(name) = query.queries.first().and_then(|it| super::plain_name(it.name())) {
                    let is_foreign = SERVER.zone.load().lookup(&name) == Lookup::Foreign;
                    assert!(is_foreign || input_class(input) != Some(1), "a name of the mesh leaves it");
                }
            }
        }
    }
}

/// It answers this question: by number, as an answer, and what it repeats of the question is that.
fn belongs(answer: &[u8], question: &[u8]) {
    assert!(answer.len() >= HEADER && answer[..2] == question[..2] && answer[2] & 0x80 != 0);
    assert_eq!(answer[2] & 0x78, question[2] & 0x78, "the operation");
    let told = Message::from_vec(answer).expect("an answer that can be read");
    if let Ok(asked) = Message::from_vec(question)
        && !told.queries.is_empty()
    {
        assert_eq!(told.queries, asked.queries);
    }
}

/// What is answered is what the zone holds.
fn is_true(answer: &[u8], question: &[u8]) {
    let told = Message::from_vec(answer).expect("an answer that can be read");
    if told.metadata.response_code != ResponseCode::NoError && told.metadata.response_code != ResponseCode::NXDomain {
        return assert!(told.answers.is_empty());
    }
    let asked = Message::from_vec(question).expect("what is answered was read");
    let [query] = asked.queries.as_slice() else { panic!("not one question") };
    assert!(told.metadata.authoritative);
    let text = query.name().to_ascii().to_ascii_lowercase();
    let ours = ["api.default.svc.mesh.internal.", "api.example.com.", "api.", "api.default.", "api.default.svc."];
    let ours = ours.contains(&text.as_str()) || ours.iter().any(|it| it.trim_end_matches('.') == text);
    let expected = match query.query_type() {
        _ if !ours => 0,
        RecordType::A | RecordType::AAAA => 1,
        RecordType::ANY => 2,
        _ => 0,
    };
    assert_eq!(told.answers.len(), expected, "{text}");
    assert!(told.answers.iter().all(|record| record.name == *query.name()));
    assert!(told.metadata.response_code == ResponseCode::NoError || !ours);
}

/// The class of the first question.
fn input_class(message: &[u8]) -> Option<u16> {
    let asked = Message::from_vec(message).ok()?;
    asked.queries.first().map(|it| it.query_class().into())
}

/// What a resolver answers: only an answer to what was asked is taken; what is given again later, from memory and while
/// resolvers fail, is that answer with another number and a shorter life; and memory stays bounded.
///
/// # Panics
/// When that does not hold.
pub fn answer(input: &[u8]) {
    let mut choices = Choices::of(input);
    let asked = question_of(&mut choices);
    let fits = choices.flag();
    let mut told = choices.rest().to_vec();
    if fits && told.len() >= HEADER {
        // Otherwise chance would have to find the number and repeat the question.
        told[..2].copy_from_slice(&asked[..2]);
        told[2] |= 0x80;
        told[4..6].copy_from_slice(&[0, 1]);
        told.splice(HEADER..HEADER, asked[HEADER..].iter().copied());
    }
    let taken = forward::answers(&asked, &told);
    if taken {
        assert!(told.len() >= HEADER && told[..2] == asked[..2] && told[2] & 0x80 != 0);
        let repeats = told.get(HEADER..asked.len()).is_some_and(|it| it.eq_ignore_ascii_case(&asked[HEADER..]));
        assert!(repeats || told[4..6] == [0, 0] && told[3] & 0x0f != 0, "an answer to another question");
    } else {
        assert!(!fits || told.len() < HEADER, "an answer to the question is not taken");
        return;
    }
    let (kept, now) = (Kept::default(), Instant::now());
    kept.keep(&asked, &told, now);
    kept.check();
    let mut again = asked.clone();
    again[..2].copy_from_slice(b"\x12\x34");
    let young = kept.young(&again, now);
    if let Some(young) = &young {
        assert_eq!((&young[..2], &young[2..]), (&again[..2], &told[2..]));
        // That a name does not exist needs no records, and may come cut short.
        assert!(!forward::is_failure(young) && (young[2] & 0x02 == 0 || young[3] & 0x0f == 3));
    }
    if let Some(stale) = kept.stale(&again, now + Duration::from_secs(60)) {
        assert!(young.is_some());
        assert_eq!((&stale[..2], stale.len()), (&again[..2], told.len()));
        // Whatever can read the one can read the other, and only how long it may be kept differs.
        if let (Ok(fresh), Ok(old)) = (Message::from_vec(&told), Message::from_vec(&stale)) {
            assert_eq!(fresh.answers.len(), old.answers.len());
            let fresh_question = fresh.queries.first().map(|it| it.name().clone());
            for (fresh, old) in fresh.answers.iter().zip(&old.answers) {
                assert_eq!((fresh.record_type(), fresh.ttl.min(5)), (old.record_type(), old.ttl));
                // A name may point at bytes that are none of a name, such as the number of the message.
                let is_address = matches!(fresh.record_type(), RecordType::A | RecordType::AAAA);
                assert!(!is_address || fresh.data == old.data);
                let is_asked = fresh_question.as_ref() == Some(&fresh.name);
                assert!(!is_asked || fresh.name == old.name, "{} became {}", fresh.name, old.name);
            }
        }
    }
    assert!(kept.stale(&again, now + Duration::from_secs(25 * 3600)).is_none(), "older than a day");
    if let Some(short) = kept::truncated(&told) {
        assert!(short.len() <= told.len() && short[2] & 0x02 != 0 && short[6..HEADER] == [0; 6]);
        assert_eq!(short[..2], told[..2]);
    }
}

/// A question for a name of up to three labels.
fn question_of(choices: &mut Choices<'_>) -> Vec<u8> {
    let mut question = vec![0; HEADER];
    question[..2].copy_from_slice(&choices.short().to_be_bytes());
    question[5] = 1;
    for _ in 0..choices.below(4) {
        let label = choices.bytes();
        let label = &label[..label.len().min(63)];
        if !label.is_empty() {
            question.push(label.len() as u8);
            question.extend_from_slice(label);
        }
    }
    question.extend_from_slice(&[0, 0, choices.one_of(&[1, 28, 255, 16]), 0, 1]);
    question
}
