//! What a peer of ours has patience for is not used up by those who share the connection to it.

use super::*;

/// More requests than a peer of ours lets be reset at once.
const MANY: usize = 900;

/// Counts requests that are worked for no more.
struct Gone(Rc<Cell<usize>>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.set(self.0.get() + 1);
    }
}

#[tokio::test(start_paused = true)]
async fn who_goes_away_with_many_requests_ends_nobody_elses() {
    local(async {
        let (near, far) = duplex(64 * 1024);
        let (_signal, drain) = drain::channel();
        let (begun, gone) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
        let (count, ended) = (begun.clone(), gone.clone());
        let service = async move |request: Request| {
            count.set(count.get() + 1);
            if request.head.target() == "/slow" {
                tokio::time::sleep(Duration::from_secs(5)).await;
                return ok(Body::Empty);
            }
            let _gone = Gone(ended.clone());
            std::future::pending().await
        };
        spawn_local(serve(far.into(), BytesMut::new(), Options::default(), drain, |_| {}, service));
        let connection = Connection::start(near.into());
        let ask = |target: &str| {
            let (connection, head) = (connection.clone(), RequestHead::new(Method::GET, Version::Http2, "web", target));
            spawn_local(async move { connection.send(&head, Body::Empty, &Interim::default()).await })
        };
        let somebodys = ask("/slow");
        let all: Vec<_> = (0..MANY).map(|_| ask("/never")).collect();
        while begun.get() <= MANY {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        all.iter().for_each(JoinHandle::abort);
        assert_eq!(somebodys.await.unwrap().unwrap().head.status, StatusCode::OK);
        // Nothing new is asked over this connection for a while.
        assert!(!connection.is_open() && gone.get() > MANY / 4 && gone.get() < MANY, "{}", gone.get());
        while gone.get() < MANY {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    })
    .await;
}
