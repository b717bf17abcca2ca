//! Answers on their way through a proxy: what of them is kept for readers that stop, and that readers get all of it.

use super::*;
use crate::h2::{AHEAD, ANSWER_WINDOW};

/// More than anybody sends.
const ALL: u32 = 1 << 30;

/// A raw client of a proxy, and what the proxy has to the application, which answers with as many bytes as the path says.
async fn through_a_proxy(settings: &[(u16, u32)]) -> (Raw, Connection) {
    let (near, far) = duplex(64 * 1024);
    let (signal, drain) = drain::channel();
    let application = async |request: Request| {
        let length = request.head.target()[1..].parse().unwrap();
        ok(Body::from(Bytes::from((0..length).map(byte).collect::<Vec<u8>>())))
    };
    spawn_local(async move {
        let _signal = signal;
        serve(far.into(), BytesMut::new(), Options::default(), drain, |_| {}, application).await
    });
    let upstream = Connection::start(near.into());
    let used = upstream.clone();
    let (mut raw, _) = client(async move |request: Request| {
        let Request { head, body, interim } = request;
        used.send(&head, body, &interim).await.ok()
    })
    .await;
    raw.settings(settings).await;
    (raw, upstream)
}

/// What is at this place of every answer.
fn byte(at: usize) -> u8 {
    (at.wrapping_mul(31) ^ at >> 8) as u8
}

async fn ask(raw: &mut Raw, stream: u32, length: usize) {
    let path = format!("/{length}");
    raw.headers(stream, END_STREAM, &[(":method", "GET"), (":scheme", "http"), (":path", &path)]).await;
}

async fn open(raw: &mut Raw, stream: u32, increment: u32) {
    raw.send(Kind::WindowUpdate, 0, stream, &increment.to_be_bytes()).await;
}

/// Everybody does what there is to do. No time passes by a clock that stands still until nobody can go on.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

/// Takes what comes until nothing does, and says of which stream and how much.
async fn take(raw: &mut Raw, mut got: impl FnMut(u32, &[u8], bool)) {
    while let Ok(next) = tokio::time::timeout(Duration::from_millis(1), raw.next()).await {
        let (header, payload) = next.expect("the connection stays");
        match header.kind {
            Kind::Data => got(header.stream, &payload, header.has(END_STREAM)),
            Kind::Ping if !header.has(frame::ACK) => raw.send(Kind::Ping, frame::ACK, 0, &payload).await,
            Kind::RstStream | Kind::GoAway => panic!("{header:?}"),
            _ => {}
        }
    }
}

#[tokio::test(start_paused = true)]
async fn readers_that_stop_are_kept_little_for() {
    const STREAMS: usize = 100;
    const LENGTH: usize = 1_000_000;
    local(async {
        for (how, initial) in
            [("no window", 0), ("one window for all", ALL), ("nothing is read", ALL), ("after a while", ALL)]
        {
            let (mut raw, upstream) = through_a_proxy(&[(setting::INITIAL_WINDOW_SIZE, initial)]).await;
            let mut taken = 0;
            if how == "after a while" {
                open(&mut raw, 0, 2_000_000).await;
            }
            if how == "nothing is read" {
                open(&mut raw, 0, ALL).await;
            }
            for stream in (1..).step_by(2).take(STREAMS) {
                ask(&mut raw, stream, LENGTH).await;
            }
            if how == "nothing is read" {
                settle().await;
            } else {
                take(&mut raw, |_, payload, _| taken += payload.len()).await;
            }
            let waiting = upstream.waiting();
            let least = STREAMS * ANSWER_WINDOW as usize;
            let most = if how == "no window" { least } else { least + AHEAD as usize };
            assert!(waiting <= most, "{how}: {waiting} bytes wait, {taken} were taken");
            assert!(waiting >= least / 2, "{how}: what is kept is counted: {waiting}");
            drop(raw);
            settle().await;
            assert_eq!((upstream.waiting(), upstream.streams()), (0, 0), "{how}");
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_window_of_a_byte_lets_a_byte_come_and_nothing_more_is_kept_for_it() {
    local(async {
        let (mut raw, upstream) = through_a_proxy(&[(setting::INITIAL_WINDOW_SIZE, 0)]).await;
        ask(&mut raw, 1, 100_000).await;
        let mut taken = 0;
        for _ in 0..500 {
            open(&mut raw, 1, 1).await;
            take(&mut raw, |_, payload, _| taken += payload.len()).await;
        }
        assert_eq!(taken, 500);
        assert!(upstream.waiting() <= ANSWER_WINDOW as usize);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_keeps_up_is_not_held_up() {
    local(async {
        let (mut raw, upstream) = through_a_proxy(&[(setting::INITIAL_WINDOW_SIZE, ALL)]).await;
        open(&mut raw, 0, ALL).await;
        // Long answers are let come with their requests, and the more the longer their reader reads.
        for stream in (1..).step_by(2).take(20) {
            ask(&mut raw, stream, 1_000_000).await;
            let mut taken = 0;
            take(&mut raw, |_, payload, _| taken += payload.len()).await;
            assert_eq!(taken, 1_000_000);
        }
        ask(&mut raw, 41, 10_000_000).await;
        settle().await;
        // Nothing was read: what the pipe does not hold waits.
        assert!(upstream.waiting() > STREAM_WINDOW as usize / 2, "{}", upstream.waiting());
    })
    .await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever windows a client opens, in whatever order: what it has room for comes, and in the end everything.
    #[test]
    fn who_opens_windows_gets_all_of_it(
        initial in prop_oneof![Just(0u32), 1u32..100, 0u32..100_000],
        lengths in proptest::collection::vec(prop_oneof![0usize..3000, 0usize..100_000], 1..9),
        increments in proptest::collection::vec((any::<u16>(), prop_oneof![1u32..300, 1u32..40_000]), 1..30),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(local(async {
            let (mut raw, upstream) = through_a_proxy(&[(setting::INITIAL_WINDOW_SIZE, initial)]).await;
            let mut windows = vec![i64::from(initial); lengths.len()];
            let mut connection = 65_535i64;
            let mut came = vec![(0usize, false); lengths.len()];
            for (place, length) in lengths.iter().enumerate() {
                ask(&mut raw, 2 * place as u32 + 1, *length).await;
            }
            // At the end every window is opened, in parts that are not too small for our patience.
            let last = (0..lengths.len() * 40).map(|turn| (turn as u16, 5000));
            for (at, increment) in increments.into_iter().chain(last) {
                let at = usize::from(at) % (lengths.len() + 1);
                let stream = if at == lengths.len() { 0 } else { 2 * at as u32 + 1 };
                open(&mut raw, stream, increment).await;
                *windows.get_mut(at).unwrap_or(&mut connection) += i64::from(increment);
                take(&mut raw, |stream, payload, ends| {
                    let place = stream as usize / 2;
                    let (got, ended) = &mut came[place];
                    assert!(payload.iter().enumerate().all(|(at, it)| *it == byte(*got + at)));
                    *got += payload.len();
                    *ended = ends;
                    windows[place] -= payload.len() as i64;
                    connection -= payload.len() as i64;
                })
                .await;
                for (place, (got, _)) in came.iter().enumerate() {
                    assert!(windows[place] >= 0 && connection >= 0);
                    let is_whole = *got == lengths[place];
                    assert!(is_whole || windows[place] == 0 || connection == 0, "stream {place} has room for more");
                }
            }
            // What is missing now has room alone.
            open(&mut raw, 0, ALL).await;
            for (place, length) in lengths.iter().enumerate() {
                if came[place].0 < *length {
                    open(&mut raw, 2 * place as u32 + 1, 1_000_000).await;
                }
            }
            take(&mut raw, |stream, payload, ends| {
                let (got, ended) = &mut came[stream as usize / 2];
                *got += payload.len();
                *ended = ends;
            })
            .await;
            for (place, length) in lengths.iter().enumerate() {
                assert_eq!(came[place].0, *length);
                assert!(came[place].1 || *length == 0);
            }
            assert_eq!(upstream.waiting(), 0);
        }));
    }
}
