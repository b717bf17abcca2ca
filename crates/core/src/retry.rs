//! Whether a failed request may be sent again.
//!
//! Only what was provably not processed is repeated: nothing of it was written, or the peer itself says that it did not
//! begin. Beyond that, a request with an idempotent method and no body may be repeated once when a reused connection
//! turns out to have been closed before any byte of a response (RFC 9110, section 9.2.2; RFC 9112, section 9.3.1).

use http::Method;

/// The most endpoints one request is offered to.
pub const MAX_TRIES: u32 = 3;

/// How far a failed attempt got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// No connection, or no byte of the request written.
    Unsent,
    /// The peer declined without processing: REFUSED_STREAM, a GOAWAY below the stream, `503 draining` of a proxy.
    Declined,
    /// Written to a reused connection that closed before any byte of a response.
    StaleConnection,
    /// Anything else: the request may have been processed.
    Unknown,
}

/// Whether another attempt is safe. `body_intact` is true when no byte of the request's body was taken from the client,
/// or it has none; `tries` counts the attempts made.
pub fn may_retry(progress: Progress, method: &Method, body_intact: bool, tries: u32) -> bool {
    if tries >= MAX_TRIES || !body_intact {
        return false;
    }
    match progress {
        Progress::Unsent | Progress::Declined => true,
        Progress::StaleConnection => is_idempotent(method) && tries < 2,
        Progress::Unknown => false,
    }
}

/// Whether repeating the method has the effect of doing it once (RFC 9110, section 9.2.2).
pub fn is_idempotent(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    proptest! {
        /// Whatever fails how often: a request is offered to three endpoints at most, and one that may have been processed is
        /// never processed twice.
        #[test]
        fn no_trace_of_failures_repeats_what_may_have_been_done(
            trace in vec(0usize..4, 0..12), method in 0usize..7, intact_for in 0usize..12
        ) {
            const ALL: [Progress; 4] =
                [Progress::Unsent, Progress::Declined, Progress::StaleConnection, Progress::Unknown];
            let methods =
                [Method::GET, Method::HEAD, Method::PUT, Method::DELETE, Method::POST, Method::PATCH, Method::CONNECT];
            let (mut tries, mut perhaps_processed) = (0, 0);
            for (count, failure) in trace.into_iter().map(|it| ALL[it]).enumerate() {
                tries += 1;
                perhaps_processed += u32::from(matches!(failure, Progress::StaleConnection | Progress::Unknown));
                if !may_retry(failure, &methods[method], count < intact_for, tries) {
                    break;
                }
            }
            prop_assert!(tries <= MAX_TRIES);
            prop_assert!(perhaps_processed <= 1 || is_idempotent(&methods[method]) && perhaps_processed <= 2);
        }
    }

    #[test]
    fn only_what_was_not_processed_is_repeated() {
        for (progress, method, body_intact, tries, expected) in [
            (Progress::Unsent, Method::POST, true, 1, true),
            (Progress::Unsent, Method::POST, true, MAX_TRIES, false),
            (Progress::Unsent, Method::POST, false, 1, false),
            (Progress::Declined, Method::POST, true, 1, true),
            (Progress::StaleConnection, Method::GET, true, 1, true),
            (Progress::StaleConnection, Method::GET, true, 2, false),
            (Progress::StaleConnection, Method::POST, true, 1, false),
            (Progress::Unknown, Method::GET, true, 1, false),
        ] {
            assert_eq!(may_retry(progress, &method, body_intact, tries), expected, "{progress:?} {method}");
        }
    }
}
