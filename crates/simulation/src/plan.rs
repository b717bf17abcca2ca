//! What happens when, drawn from a seed.

use crate::disk::Down;
use rand::Rng;
use rand::rngs::StdRng;
use std::fmt;

/// What a seed is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scenario {
    /// Everything fails in turn, on one host's unix socket, while the configuration changes.
    Chaos,
    /// The same over TLS, from other hosts.
    Remote,
    /// The configuration goes back and forth between two versions, and what is past must not come back.
    BackAndForth,
    /// Clocks are wrong for a while.
    Clocks,
    /// Certificates end and are renewed while control plane and proxies come and go.
    Certificates,
}

impl Scenario {
    /// Every one.
    pub const ALL: [Scenario; 5] =
        [Scenario::Chaos, Scenario::Remote, Scenario::BackAndForth, Scenario::Clocks, Scenario::Certificates];

    /// What a seed is about.
    pub fn of(seed: u64) -> Self {
        match seed % 20 {
            0..=8 => Scenario::Chaos,
            9..=12 => Scenario::Remote,
            13..=16 => Scenario::BackAndForth,
            17 | 18 => Scenario::Clocks,
            _ => Scenario::Certificates,
        }
    }

    /// Whether proxies come over TLS.
    pub fn is_remote(self) -> bool {
        match self {
            Scenario::Remote | Scenario::Clocks | Scenario::Certificates => true,
            Scenario::Chaos | Scenario::BackAndForth => false,
        }
    }

    /// How long certificates last, in seconds.
    pub fn lifetime_s(self) -> u32 {
        match self {
            Scenario::Certificates => 60,
            Scenario::Chaos | Scenario::Remote | Scenario::BackAndForth | Scenario::Clocks => 24 * 3600,
        }
    }
}

/// Something that happens.
#[derive(Clone, Debug)]
pub enum Action {
    /// Nothing passes between a proxy and the control plane; what is sent is lost.
    Cut {
        /// Which.
        proxy: usize,
        /// For how long.
        for_ms: u64,
    },
    /// The same, and what is sent arrives afterwards.
    Hold {
        /// Which.
        proxy: usize,
        /// For how long.
        for_ms: u64,
    },
    /// A proxy's host goes down.
    ProxyDown {
        /// Which.
        proxy: usize,
        /// How.
        how: Down,
        /// For how long.
        for_ms: u64,
    },
    /// A proxy's host loses its power in the middle of writing, this many steps from now.
    DiskFails {
        /// Which.
        proxy: usize,
        /// After how many steps.
        steps: u32,
        /// After how many bytes, where that step writes.
        bytes: usize,
    },
    /// A workload leaves in order, and comes back.
    Leave {
        /// Which.
        proxy: usize,
        /// For how long.
        for_ms: u64,
    },
    /// The control plane's host goes down.
    ControlDown {
        /// How.
        how: Down,
        /// For how long.
        for_ms: u64,
    },
    /// The configuration is written anew.
    Configure,
    /// It is, and cannot be read.
    Break,
    /// Messages take up to this long.
    Slow {
        /// How long.
        max_ms: u64,
    },
    /// A clock is wrong.
    Wrong {
        /// Whose; the control plane's without.
        proxy: Option<usize>,
        /// By how much.
        by_ms: i64,
        /// For how long.
        for_ms: u64,
    },
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Cut { proxy, for_ms } => write!(f, "p{proxy} is cut off for {for_ms} ms"),
            Action::Hold { proxy, for_ms } => write!(f, "p{proxy}'s messages are held for {for_ms} ms"),
            Action::ProxyDown { proxy, how, for_ms } => write!(f, "p{proxy} is down for {for_ms} ms ({how:?})"),
            Action::DiskFails { proxy, steps, bytes } => {
                write!(f, "p{proxy} will lose its power after {steps} steps and {bytes} bytes of writing")
            }
            Action::Leave { proxy, for_ms } => write!(f, "p{proxy} leaves for {for_ms} ms"),
            Action::ControlDown { how, for_ms } => write!(f, "control is down for {for_ms} ms ({how:?})"),
            Action::Configure => f.write_str("the configuration is written"),
            Action::Break => f.write_str("the configuration is written wrongly"),
            Action::Slow { max_ms } => write!(f, "messages take up to {max_ms} ms"),
            Action::Wrong { proxy: Some(proxy), by_ms, for_ms } => {
                write!(f, "p{proxy}'s clock is wrong by {by_ms} ms for {for_ms} ms")
            }
            Action::Wrong { proxy: None, by_ms, for_ms } => {
                write!(f, "control's clock is wrong by {by_ms} ms for {for_ms} ms")
            }
        }
    }
}

/// What happens in a run, in order.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What it is about.
    pub scenario: Scenario,
    /// How many proxies there are.
    pub proxies: usize,
    /// How long it lasts.
    pub lasts_ms: u64,
    /// What happens, by milliseconds from its beginning.
    pub actions: Vec<(u64, Action)>,
}

impl Plan {
    /// Draws a plan.
    pub fn draw(scenario: Scenario, random: &mut StdRng) -> Self {
        let proxies = random.random_range(2..=3);
        let (lasts_ms, number) = match scenario {
            Scenario::Certificates => (100_000, random.random_range(6..=10)),
            Scenario::Clocks => (random.random_range(4_000..9_000), random.random_range(3..=6)),
            _ => (random.random_range(3_000..9_000), random.random_range(4..=10)),
        };
        let mut actions: Vec<(u64, Action)> =
            (0..number).map(|_| (random.random_range(0..lasts_ms), draw_action(scenario, proxies, random))).collect();
        if scenario == Scenario::Certificates {
            // One after the other: whoever is away for longer than a certificate has left cannot have another.
            for (number, (at, action)) in actions.iter_mut().enumerate() {
                *at = number as u64 * 10_000 + random.random_range(0..2_000);
                if let Action::Cut { for_ms, .. } = action {
                    *for_ms = (*for_ms).min(6_000);
                }
            }
        }
        if scenario == Scenario::BackAndForth {
            actions.extend((0..4).map(|_| (random.random_range(0..lasts_ms), Action::Configure)));
        }
        actions.sort_by_key(|(at, _)| *at);
        Self { scenario, proxies, lasts_ms, actions }
    }

    /// Draws what must not change anything any more.
    pub fn draw_calm(&self, random: &mut StdRng) -> Self {
        let draw = |random: &mut StdRng| loop {
            match draw_action(self.scenario, self.proxies, random) {
                Action::Configure | Action::Break => {}
                action => return action,
            }
        };
        let mut actions: Vec<_> = (0..3).map(|_| (random.random_range(0..2_000), draw(random))).collect();
        actions.sort_by_key(|(at, _)| *at);
        Self { lasts_ms: 4_000, actions, ..self.clone() }
    }
}

fn draw_action(scenario: Scenario, proxies: usize, random: &mut StdRng) -> Action {
    let proxy = random.random_range(0..proxies);
    let how = if random.random() { Down::Killed } else { Down::PowerFailed };
    let for_ms = random.random_range(100..5_000);
    if scenario == Scenario::Clocks && random.random_bool(0.6) {
        let by = [2_000, 60_000, 3_600_000, 25 * 3_600_000, 400 * 3_600_000][random.random_range(0..5)];
        let by_ms = if random.random() { by } else { -by };
        return Action::Wrong { proxy: random.random_bool(0.6).then_some(proxy), by_ms, for_ms };
    }
    match random.random_range(0..14) {
        0 | 1 => Action::Cut { proxy, for_ms: random.random_range(100..14_000) },
        2 => Action::Hold { proxy, for_ms },
        3 | 4 => Action::ProxyDown { proxy, how, for_ms },
        5 => Action::DiskFails { proxy, steps: random.random_range(0..8), bytes: random.random_range(0..4096) },
        6 => Action::Leave { proxy, for_ms: for_ms + 1_000 },
        7..=9 => Action::ControlDown { how, for_ms },
        10 | 11 => Action::Configure,
        12 => Action::Break,
        _ => Action::Slow { max_ms: random.random_range(40..300) },
    }
}
