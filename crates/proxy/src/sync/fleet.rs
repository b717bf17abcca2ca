//! One registration: the workload, its health, its traffic, and its leaving.

use super::{Lost, marked};
use crate::control::clients::fleet_client::FleetClient;
use crate::identity::Held;
use crate::metrics::Metrics;
use sheer_core::wire::v1::{self, control_notice, proxy_report};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// How often counters that changed are reported.
const REPORT: Duration = Duration::from_secs(1);

/// How long the last words may take to arrive.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Reports that may wait; telemetry is left for the next second when they do.
const QUEUE: usize = 64;

/// How far the workload has come in leaving, as the control plane is to be told.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leaving {
    /// Not at all.
    #[default]
    No,
    /// Another proxy speaks for the workload now: this one tells of its traffic as long as its stream lasts, and of
    /// nothing else.
    Replaced,
    /// Its peers should go elsewhere.
    Draining {
        /// For how long requests may still last.
        grace_ms: u32,
    },
    /// Its endpoints leave at once.
    Gone {
        /// Why, for people.
        reason: String,
    },
    /// Everything is counted and the proxy ends.
    Done,
}

/// What the control plane said of the registration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// Nothing yet.
    #[default]
    Unknown,
    /// It is registered.
    Registered,
    /// It is not, and why, with how to mend it.
    Refused {
        /// In the control plane's words.
        message: String,
    },
}

/// What a registration needs.
pub(super) struct Fleet {
    pub(super) registration: v1::Registration,
    pub(super) ready_ports: watch::Receiver<BTreeSet<u16>>,
    pub(super) unreachable: mpsc::Receiver<String>,
    pub(super) leaving: watch::Receiver<Leaving>,
    pub(super) standing: watch::Sender<Standing>,
    /// In what time to come back after a loss, as the control plane said; 0 while it has not.
    pub(super) pace: watch::Sender<u32>,
    pub(super) held: watch::Receiver<Option<Arc<Held>>>,
    pub(super) metrics: Arc<Metrics>,
}

impl Fleet {
    /// Registers and reports until the stream ends, which is an error, or everything is said.
    pub(super) async fn attend(&mut self, channel: Channel, serving: bool) -> Result<(), Lost> {
        let (reports, outgoing) = mpsc::channel(QUEUE);
        let mut said = Leaving::No;
        self.register(&reports).await;
        let mut client = FleetClient::new(channel);
        let mut notices =
            client.attach(marked(ReceiverStream::new(outgoing), serving)).await.map_err(Lost::from)?.into_inner();
        let mut tick = tokio::time::interval(REPORT);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Whatever was reported on a stream before may not have arrived.
        let mut all = true;
        self.leaving.mark_changed();
        self.held.mark_changed();
        loop {
            // Each arm may be dropped: all of them are cancel safe, and nothing is taken before it is sent.
            tokio::select! {
                notice = notices.message() => match notice {
                    Ok(Some(notice)) => self.hear(notice),
                    Ok(None) => return Err(Lost::Ended),
                    Err(status) => return Err(Lost::from(status)),
                },
                Ok(()) = self.ready_ports.changed() => {
                    let ready = self.ready_ports.borrow_and_update().iter().copied().map(u32::from).collect();
                    send(&reports, proxy_report::Body::Health(v1::PortHealth { ready })).await;
                }
                Ok(()) = self.leaving.changed() => {
                    let now = self.leaving.borrow_and_update().clone();
                    self.leave(&reports, &mut said, &now, all).await;
                    if now == Leaving::Done {
                        break;
                    }
                }
                Ok(()) = self.held.changed() => {
                    let in_force = self.held.borrow_and_update().as_deref().map(in_force);
                    if let Some(trust) = in_force {
                        send(&reports, proxy_report::Body::Trust(trust)).await;
                    }
                }
                Some(workload) = self.unreachable.recv() => {
                    send(&reports, proxy_report::Body::Unreachable(v1::Unreachable { workload })).await;
                }
                _ = tick.tick() => {
                    if let Ok(permit) = reports.try_reserve()
                        && let Some(telemetry) = self.metrics.report(all)
                    {
                        all = false;
                        permit.send(report(proxy_report::Body::Telemetry(telemetry)));
                    }
                }
            }
        }
        // Closing this half lets the control plane read to the end; then it closes the other.
        drop(reports);
        let _ = tokio::time::timeout(LAST_WORDS, async { while let Ok(Some(_)) = notices.message().await {} }).await;
        Ok(())
    }

    async fn register(&mut self, reports: &mpsc::Sender<v1::ProxyReport>) {
        let mut registration = self.registration.clone();
        let ready = self.ready_ports.borrow_and_update().clone();
        for port in &mut registration.ports {
            port.ready = u16::try_from(port.port).is_ok_and(|number| ready.contains(&number));
        }
        send(reports, proxy_report::Body::Registration(registration)).await;
    }

    fn hear(&self, notice: v1::ControlNotice) {
        match notice.body {
            Some(control_notice::Body::Registered(registered)) => {
                for warning in &registered.warnings {
                    tracing::warn!("the control plane warns: {warning}");
                }
                tracing::info!(uid = registered.uid, "registered");
                self.standing.send_replace(Standing::Registered);
            }
            Some(control_notice::Body::Refused(refused)) => {
                let message =
                    format!("the control plane refused the registration: {}; {}", refused.reason, refused.mend);
                tracing::error!("{message}");
                self.standing.send_replace(Standing::Refused { message });
            }
            Some(control_notice::Body::Pace(pace)) => {
                self.pace
                    .send_if_modified(|held| std::mem::replace(held, pace.return_within_ms) != pace.return_within_ms);
            }
            // A notice of a later version.
            None => {}
        }
    }

    async fn leave(&self, reports: &mpsc::Sender<v1::ProxyReport>, said: &mut Leaving, now: &Leaving, all: bool) {
        if *now <= *said {
            return;
        }
        match now {
            Leaving::No | Leaving::Replaced => {}
            Leaving::Draining { grace_ms } => {
                send(reports, proxy_report::Body::Draining(v1::Draining { grace_ms: *grace_ms })).await;
            }
            Leaving::Gone { reason } => {
                send(reports, proxy_report::Body::Goodbye(v1::Goodbye { reason: reason.clone() })).await;
            }
            Leaving::Done => {
                if let Some(telemetry) = self.metrics.report(all) {
                    send(reports, proxy_report::Body::Telemetry(telemetry)).await;
                }
                if !matches!(said, Leaving::Gone { .. } | Leaving::Replaced) {
                    let reason = "the proxy ended".to_owned();
                    send(reports, proxy_report::Body::Goodbye(v1::Goodbye { reason })).await;
                }
            }
        }
        *said = now.clone();
    }
}

/// What connections are made and judged with.
fn in_force(held: &Held) -> v1::Trust {
    let root_sha256 = held.root_sha256().map(|it| it.to_vec()).unwrap_or_default();
    v1::Trust { sequence: held.trust_sequence(), root_sha256: root_sha256.into() }
}

fn report(body: proxy_report::Body) -> v1::ProxyReport {
    v1::ProxyReport { body: Some(body) }
}

async fn send(reports: &mpsc::Sender<v1::ProxyReport>, body: proxy_report::Body) {
    // When the stream has ended, its other half says so.
    let _ = reports.send(report(body)).await;
}
