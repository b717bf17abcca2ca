//! The last good answers of the host's resolvers, given again while these fail (RFC 8767).
//!
//! An answer belongs to the question as it was asked, byte by byte but for the id: whoever asks in another way gets an answer
//! of their own. That a name does not exist, or has nothing of the kind, is an answer too, and is believed: it ends what was
//! kept, and is itself given again for a moment only.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An answer so young is given again without asking: however many ask, and however short its life, a name is asked for once
/// in this time. So it is while resolvers fail.
const AGAIN: Duration = Duration::from_secs(1);

/// How old an answer may become when no resolver gives another one.
const STALE: Duration = Duration::from_secs(24 * 3600);

/// For how long whoever gets an old answer may keep it, in seconds: RFC 8767 recommends 30, names of the mesh have 5.
const STALE_TTL_S: u32 = 5;

/// Bytes kept, of questions and answers together; those unused for longest go first.
const MAX_BYTES: usize = 1 << 20;

const HEADER: usize = 12;

/// NXDOMAIN (RFC 1035, section 4.1.1).
const NO_NAME: u8 = 3;

/// The answers of one proxy.
#[derive(Default)]
pub(super) struct Kept(Mutex<Answers>);

#[derive(Default)]
struct Answers {
    known: HashMap<Arc<[u8]>, Answer>,
    bytes: usize,
}

struct Answer {
    bytes: Vec<u8>,
    got: Instant,
    /// When the resolvers were last asked for it, or failed to answer.
    asked: Instant,
    /// Whether that was in vain.
    failed: bool,
    /// It says that there is nothing: no answer to give while resolvers fail.
    nothing: bool,
}

impl Answer {
    /// Whether it is still an answer when no resolver gives another one.
    fn outlives(&self, now: Instant) -> bool {
        !self.nothing && now.duration_since(self.got) < STALE
    }
}

impl Kept {
    /// What may be answered without asking: a young answer, or an old one that was just asked for in vain. Otherwise it is
    /// asked.
    pub(super) fn young(&self, question: &[u8], now: Instant) -> Option<Vec<u8>> {
        let mut answers = self.0.lock();
        let answer = answers.known.get_mut(question.get(2..)?)?;
        if now.duration_since(answer.got) < AGAIN {
            return with_id(&answer.bytes, question);
        }
        if answer.failed && now.duration_since(answer.asked) < AGAIN && answer.outlives(now) {
            return with_id(&old(&answer.bytes)?, question);
        }
        answer.asked = now;
        None
    }

    /// Whether there is an answer to give when the resolvers fail.
    pub(super) fn knows(&self, question: &[u8], now: Instant) -> bool {
        let answers = self.0.lock();
        let known = question.get(2..).and_then(|key| answers.known.get(key));
        known.is_some_and(|answer| answer.outlives(now))
    }

    /// The last good answer, when the resolvers have failed now.
    pub(super) fn stale(&self, question: &[u8], now: Instant) -> Option<Vec<u8>> {
        let mut answers = self.0.lock();
        let answer = answers.known.get_mut(question.get(2..)?)?;
        // From here on, and not from when they were asked: they may have taken longer than a second to fail.
        (answer.failed, answer.asked) = (true, now);
        if !answer.outlives(now) {
            return None;
        }
        with_id(&old(&answer.bytes)?, question)
    }

    /// Keeps a good answer, and one that says that there is nothing. That a name does not exist any more ends what was kept
    /// of it; that it has nothing of the kind may come of a resolver in trouble, and does not.
    pub(super) fn keep(&self, question: &[u8], answer: &[u8], now: Instant) {
        let Some(key) = question.get(2..) else { return };
        let has_ended = answer.get(3).is_some_and(|flags| flags & 0x0f == NO_NAME);
        let nothing = has_ended || is_empty(answer);
        let mut answers = self.0.lock();
        let had = answers.known.get(key).is_some_and(|before| before.outlives(now));
        if !has_ended && (nothing && had || !nothing && !is_good(answer)) {
            return;
        }
        if let Some(before) = answers.known.remove(key) {
            answers.bytes -= key.len() + before.bytes.len();
        }
        if key.len() + answer.len() > MAX_BYTES / 8 {
            return;
        }
        answers.bytes += key.len() + answer.len();
        answers
            .known
            .insert(key.into(), Answer { bytes: answer.to_vec(), got: now, asked: now, failed: false, nothing });
        if answers.bytes > MAX_BYTES {
            // Names that somebody makes up push nothing out that is worth keeping.
            answers.known.retain(|_, it| !it.nothing || now.duration_since(it.got) < AGAIN);
            answers.bytes = answers.known.iter().map(|(key, it)| key.len() + it.bytes.len()).sum();
        }
        while answers.bytes > MAX_BYTES {
            let oldest = answers.known.iter().min_by_key(|(_, it)| (!it.nothing, it.asked)).map(|(key, _)| key.clone());
            let Some((key, gone)) = oldest.and_then(|key| answers.known.remove_entry(&key)) else { break };
            answers.bytes -= key.len() + gone.bytes.len();
        }
    }
}

/// Not truncated, without an error, with at least one record.
fn is_good(answer: &[u8]) -> bool {
    answer.len() > HEADER && answer[2] & 0x02 == 0 && answer[3] & 0x0f == 0 && answer[6..8] != [0, 0]
}

/// Not truncated, without an error, and without a record (RFC 2308, NODATA).
fn is_empty(answer: &[u8]) -> bool {
    answer.len() > HEADER && answer[2] & 0x02 == 0 && answer[3] & 0x0f == 0 && answer[6..8] == [0, 0]
}

/// An answer without its records, which says that there are more than fit.
pub(super) fn truncated(answer: &[u8]) -> Option<Vec<u8>> {
    let mut end = HEADER;
    for _ in 0..u16::from_be_bytes(answer.get(4..6)?.try_into().ok()?) {
        end = after_name(answer, end)? + 4;
    }
    let mut short = answer.get(..end)?.to_vec();
    short[2] |= 0x02;
    short[6..HEADER].fill(0);
    Some(short)
}

fn with_id(answer: &[u8], question: &[u8]) -> Option<Vec<u8>> {
    let mut answer = answer.to_vec();
    answer.get_mut(..2)?.copy_from_slice(question.get(..2)?);
    Some(answer)
}

/// The same answer, to be kept for a moment only. `None` for what cannot be read.
fn old(answer: &[u8]) -> Option<Vec<u8>> {
    /// A record that says nothing about a name; its field for the time means something else.
    const OPT: u16 = 41;
    let mut answer = answer.to_vec();
    let number = |answer: &[u8], at: usize| Some(u16::from_be_bytes(answer.get(at..at + 2)?.try_into().ok()?));
    let mut at = HEADER;
    for _ in 0..number(&answer, 4)? {
        at = after_name(&answer, at)? + 4;
    }
    // As many as somebody says, in three numbers of 16 bits; there are no more than there are bytes for.
    let records = [6, 8, 10].into_iter().map(|place| number(&answer, place).map(u32::from)).sum::<Option<u32>>()?;
    for _ in 0..records {
        at = after_name(&answer, at)?;
        let kind = number(&answer, at)?;
        let ttl = answer.get_mut(at + 4..at + 8)?;
        if kind != OPT {
            let seconds = u32::from_be_bytes(ttl.try_into().ok()?).min(STALE_TTL_S);
            ttl.copy_from_slice(&seconds.to_be_bytes());
        }
        at += 10 + usize::from(number(&answer, at + 8)?);
    }
    (at <= answer.len()).then_some(answer)
}

/// Where the bytes after a name begin; it ends with a root label or a pointer (RFC 1035, section 4.1.4).
fn after_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            label if label & 0xc0 == 0xc0 => return Some(at + 2),
            label if label < 64 => at += 1 + usize::from(label),
            _ => return None,
        }
    }
}

#[cfg(any(test, feature = "fuzzing"))]
impl Kept {
    /// What is counted is what there is, and bounded.
    pub(super) fn check(&self) {
        let answers = self.0.lock();
        let held: usize = answers.known.iter().map(|(key, it)| key.len() + it.bytes.len()).sum();
        assert_eq!(held, answers.bytes);
        assert!(held <= MAX_BYTES, "{held}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query};
    use hickory_proto::rr::rdata::A;
    use hickory_proto::rr::{Name, RData, Record, RecordType};
    use proptest::prelude::*;

    fn question(id: u16, name: &str) -> Vec<u8> {
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        message.to_vec().unwrap()
    }

    fn answer(question: &[u8], records: usize) -> Vec<u8> {
        let query = Message::from_vec(question).unwrap();
        let mut answer = Message::response(query.metadata.id, OpCode::Query);
        answer.queries = query.queries.clone();
        let name = query.queries[0].name();
        for last in 0..records {
            let address = std::net::Ipv4Addr::from(0xc000_0200 + u32::try_from(last).unwrap());
            answer.add_answer(Record::from_rdata(name.clone(), 600, RData::A(A(address))));
        }
        let mut edns = Edns::new();
        edns.set_max_payload(4096);
        answer.set_edns(edns);
        answer.to_vec().unwrap()
    }

    #[test]
    fn a_name_is_asked_for_once_a_second() {
        let (kept, now) = (Kept::default(), Instant::now());
        let after = |ms: u64| now + Duration::from_millis(ms);
        let (first, second) = (question(1, "example.org."), question(2, "example.org."));
        assert_eq!(kept.young(&first, now), None);
        kept.keep(&first, &answer(&first, 2), now);
        assert_eq!(kept.young(&second, after(900)), Some(answer(&second, 2)), "with its own id, and its own time");
        assert_eq!(kept.young(&second, after(1000)), None, "it is asked for again");
        assert_eq!(
            kept.young(&second, after(1100)),
            None,
            "also by TCP, where the answer was too long: nothing failed"
        );
        // The resolvers fail.
        let told = Message::from_vec(&kept.stale(&second, after(1500)).unwrap()).unwrap();
        assert_eq!((told.metadata.id, told.answers.len(), told.answers[0].ttl), (2, 2, STALE_TTL_S));
        assert_eq!(told.edns.map(|it| it.max_payload()), Some(4096));
        assert!(kept.young(&first, after(2400)).is_some(), "they are not asked again for a second after that");
        assert_eq!(kept.young(&first, after(2500)), None);
        assert!(kept.stale(&first, after(2000) + STALE).is_none());
        assert_eq!(kept.stale(&question(1, "other.org."), now), None);
    }

    #[test]
    fn errors_and_empty_answers_are_not_kept() {
        let (kept, now) = (Kept::default(), Instant::now());
        let asked = question(1, "example.org.");
        let mut failed = answer(&asked, 1);
        failed[3] |= 3;
        let mut truncated = answer(&asked, 1);
        truncated[2] |= 2;
        for bad in [&failed, &truncated, &answer(&asked, 0)] {
            kept.keep(&asked, bad, now);
            assert_eq!(kept.stale(&asked, now), None);
        }
        kept.keep(&asked, &answer(&asked, 1), now);
        kept.keep(&asked, &truncated, now);
        assert!(kept.stale(&asked, now).is_some());
        kept.keep(&asked, &failed, now);
        assert_eq!(kept.stale(&asked, now), None, "the name has ended");
    }

    #[test]
    fn that_there_is_nothing_is_asked_once_a_second() {
        let (kept, now) = (Kept::default(), Instant::now());
        let after = |ms: u64| now + Duration::from_millis(ms);
        let (first, second) = (question(1, "example.org."), question(2, "example.org."));
        let no_name = |question: &[u8]| {
            let mut told = answer(question, 0);
            told[3] |= NO_NAME;
            told
        };
        for nothing in [&no_name, &|question: &[u8]| answer(question, 0)] as [&dyn Fn(&[u8]) -> Vec<u8>; 2] {
            kept.keep(&first, &nothing(&first), now);
            assert_eq!(kept.young(&second, after(900)), Some(nothing(&second)));
            assert_eq!(kept.young(&second, after(1000)), None);
            assert!(!kept.knows(&second, after(1000)), "there is nothing to give while resolvers fail");
            assert_eq!(kept.stale(&second, after(1500)), None);
            assert_eq!(kept.young(&second, after(1600)), None);
        }
        // A resolver in trouble has no addresses all of a sudden; a name that ends is another matter.
        kept.keep(&first, &answer(&first, 1), now);
        kept.keep(&first, &answer(&first, 0), now);
        assert!(kept.stale(&first, now).is_some());
        kept.keep(&first, &no_name(&first), now);
        assert_eq!(kept.stale(&first, now), None);
    }

    #[test]
    fn made_up_names_push_nothing_out() {
        let (kept, now) = (Kept::default(), Instant::now());
        let good = question(1, "example.org.");
        kept.keep(&good, &answer(&good, 1), now);
        for number in 0..30_000 {
            let asked = question(1, &format!("name-{number}.example.org."));
            kept.keep(&asked, &answer(&asked, 0), now + Duration::from_millis(number));
        }
        assert!(kept.0.lock().bytes <= MAX_BYTES);
        assert!(kept.stale(&good, now + Duration::from_secs(60)).is_some());
    }

    #[test]
    fn an_answer_that_does_not_fit_says_so() {
        let asked = question(7, "example.org.");
        let short = Message::from_vec(&truncated(&answer(&asked, 1000)).unwrap()).unwrap();
        assert!(short.metadata.truncation);
        assert_eq!((short.metadata.id, short.answers.len(), short.queries.len()), (7, 0, 1));
    }

    #[test]
    fn more_records_than_can_be_counted_are_none() {
        let asked = question(1, "example.org.");
        let mut lies = answer(&asked, 1);
        lies[6..12].fill(0xff);
        assert_eq!(old(&lies), None);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let (kept, now) = (Kept::default(), Instant::now());
        for number in 0..2000 {
            let asked = question(1, &format!("name-{number}.example.org."));
            kept.keep(&asked, &answer(&asked, 60), now + Duration::from_millis(number));
        }
        kept.check();
        assert!(kept.0.lock().bytes > MAX_BYTES / 2);
        assert!(kept.stale(&question(1, "name-1999.example.org."), now + Duration::from_secs(2)).is_some());
        assert!(kept.stale(&question(1, "name-0.example.org."), now + Duration::from_secs(2)).is_none());
    }

    proptest! {
        #[test]
        fn no_answer_panics(bytes: Vec<u8>) {
            let _ = (old(&bytes), truncated(&bytes));
            Kept::default().keep(&question(1, "a."), &bytes, Instant::now());
        }
    }
}
