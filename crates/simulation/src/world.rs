//! A run of one seed: hosts, what happens to them, and whether what must hold does.

use crate::disk::Down;
use crate::host::{CONTROL, ControlHost, ProxyHost, STATE, Wall};
use crate::plan::{Action, Plan, Scenario};
use crate::seen::{MARKED_FROM, Seen, admits};
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use parking_lot::Mutex;
use prost::Message as _;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sheer_core::snapshot::Health;
use sheer_proxy::identity::Held;
use sheer_proxy::state::{CONFIGURATION, Configuration, Directory, IDENTITY};
use sheer_proxy::sync::Leaving;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use turmoil::Sim;

/// A step of simulated time. Messages arrive between steps.
const STEP_MS: u64 = 25;
/// How long messages take at most, unless something makes them slower.
const LATENCY_MS: u64 = 30;
/// How long everything may take to come together, at the start and after everything works again.
const TOGETHER_MS: u64 = 60_000;
/// For how long it must stay so: longer than a change takes to be stored, and than a connection that lost something in
/// silence takes to be given up.
const CALM_MS: u64 = 5_000;
/// The same at the start, where nothing was lost.
const BEGIN_MS: u64 = 1_000;
/// How long a change takes to be stored, at most.
const STORED_MS: u64 = 2_500;
/// How soon a proxy that finds its configuration on disk serves, with the control plane or without.
const FROM_DISK_MS: u64 = 3_000;

/// What a run came to.
#[derive(Debug)]
pub struct Outcome {
    /// What happened, line by line.
    pub trace: Vec<String>,
    /// How long it took to come together again, or what was wrong.
    pub result: Result<u64>,
}

/// Runs a seed.
pub fn run(seed: u64) -> Outcome {
    let panics: Arc<Mutex<Vec<String>>> = Arc::default();
    let noted = panics.clone();
    std::panic::set_hook(Box::new(move |panic| noted.lock().push(panic.to_string())));
    let mut trace = Vec::new();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut world = World::new(seed, panics.clone())?;
        let result = world.live();
        trace = std::mem::take(&mut world.trace);
        result
    }));
    drop(std::panic::take_hook());
    let result = match result {
        Ok(result) => result,
        Err(_) => Err(anyhow!("the simulation panicked: {}", panics.lock().join("; "))),
    };
    Outcome { trace, result }
}

struct World {
    plan: Plan,
    random: StdRng,
    sim: Sim<'static>,
    elapsed_ms: Arc<AtomicU64>,
    control: Arc<ControlHost>,
    control_back: Option<u64>,
    control_silent: bool,
    control_right: Option<u64>,
    members: Vec<Member>,
    /// The versions that were written, and the present one.
    written: BTreeSet<u16>,
    version: u16,
    /// Whether the configuration directory holds something wrong beside.
    is_broken: bool,
    /// Nothing else may be shown any more.
    frozen: Option<u16>,
    /// Somebody has another certificate since hands were shaken.
    renewed: bool,
    trace: Vec<String>,
    panics: Arc<Mutex<Vec<String>>>,
    _home: tempfile::TempDir,
}

/// A proxy's host as the world knows it.
struct Member {
    host: Arc<ProxyHost>,
    seen: Seen,
    changed_ms: u64,
    /// When it was down last, and when it comes back.
    was_down: bool,
    back: Option<u64>,
    /// It lost its power: nothing was told of its connections.
    silent: bool,
    leaves: Option<(u64, u64)>,
    cut_until: u64,
    held_until: u64,
    link: Link,
    right: Option<u64>,
    /// When it must serve, since it found a configuration on its disk.
    due: Option<u64>,
    held: Option<Arc<Held>>,
    /// What was on its disk when it was last looked at.
    stored: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Open,
    Held,
    Cut,
}

impl World {
    fn new(seed: u64, panics: Arc<Mutex<Vec<String>>>) -> Result<Self> {
        let mut random = StdRng::seed_from_u64(seed);
        let scenario = Scenario::of(seed);
        let plan = Plan::draw(scenario, &mut random);
        let elapsed_ms: Arc<AtomicU64> = Arc::default();
        // What the control plane keeps in plain files is flushed often, and the disk is not what is tested there.
        let shared = Path::new("/dev/shm");
        let home = match shared.is_dir() {
            true => tempfile::tempdir_in(shared).or_else(|_| tempfile::tempdir())?,
            false => tempfile::tempdir()?,
        };
        let control = Arc::new(ControlHost {
            home: home.path().to_owned(),
            wall: Wall::new(&elapsed_ms),
            disk: Default::default(),
            running: Mutex::default(),
        });
        let mut sim = turmoil::Builder::new()
            .rng_seed(seed)
            .tick_duration(Duration::from_millis(STEP_MS))
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(Duration::from_millis(LATENCY_MS))
            .simulation_duration(Duration::from_secs(100_000))
            .tcp_capacity(4096)
            .build();
        let host = control.clone();
        sim.host(CONTROL, move || host.clone().run());
        let mut world = Self {
            plan,
            random,
            sim,
            elapsed_ms,
            control,
            control_back: None,
            control_silent: false,
            control_right: None,
            members: Vec::new(),
            written: BTreeSet::new(),
            version: 0,
            is_broken: false,
            frozen: None,
            renewed: true,
            trace: Vec::new(),
            panics,
            _home: home,
        };
        std::fs::create_dir_all(world.control.config())?;
        world.configure()?;
        for number in 0..world.plan.proxies {
            world.join(u16::try_from(number)?, "web")?;
        }
        Ok(world)
    }

    fn join(&mut self, number: u16, service: &str) -> Result<()> {
        let host = Arc::new(ProxyHost::new(number, service, &["web", "extra"], &self.elapsed_ms)?);
        let runs = host.clone();
        self.sim.host(host.name.as_str(), move || runs.clone().run());
        self.members.push(Member {
            host,
            seen: Seen::default(),
            changed_ms: 0,
            was_down: false,
            back: None,
            silent: false,
            leaves: None,
            cut_until: 0,
            held_until: 0,
            link: Link::Open,
            right: None,
            due: None,
            held: None,
            stored: false,
        });
        Ok(())
    }

    fn now(&self) -> u64 {
        self.elapsed_ms.load(Relaxed)
    }

    fn tell(&mut self, text: impl std::fmt::Display) {
        let line = format!("{:8.2} {text}", self.now() as f64 / 1000.0);
        self.trace.push(line);
    }

    /// The whole run: how long it took to come together again.
    fn live(&mut self) -> Result<u64> {
        let plan = self.plan.clone();
        self.tell(format!("{:?}, {} proxies", plan.scenario, plan.proxies));
        self.come_together(BEGIN_MS)?;
        if plan.scenario.is_remote() {
            // The first certificate came by the unix socket; now they are on other hosts.
            for number in 0..self.members.len() {
                self.members[number].host.is_remote.store(true, Relaxed);
                self.proxy_down(number, Down::Killed, 0)?;
            }
            self.come_together(BEGIN_MS)?;
        }
        self.members.iter_mut().for_each(|it| it.was_down = false);
        self.tell("it begins");
        self.suffer(&plan)?;
        let took = self.come_together(CALM_MS)?;
        if plan.scenario == Scenario::BackAndForth {
            self.frozen = Some(self.version);
            let calm = plan.draw_calm(&mut self.random);
            self.tell("nothing is written any more");
            self.suffer(&calm)?;
            self.come_together(CALM_MS)?;
        }
        if self.random.random_ratio(1, 4) {
            self.compare_with_a_new_one()?;
        }
        Ok(took)
    }

    /// What the plan says happens; at its end everything works again.
    fn suffer(&mut self, plan: &Plan) -> Result<()> {
        let began = self.now();
        let mut actions = plan.actions.iter().peekable();
        while self.now() < began + plan.lasts_ms {
            while let Some((_, action)) = actions.next_if(|(at, _)| began + at <= self.now()) {
                self.act(action)?;
            }
            self.step()?;
        }
        self.heal()
    }

    fn act(&mut self, action: &Action) -> Result<()> {
        self.tell(action);
        let now = self.now();
        match *action {
            Action::Cut { proxy, for_ms } => self.members[proxy].cut_until = now + for_ms,
            Action::Hold { proxy, for_ms } => self.members[proxy].held_until = now + for_ms,
            Action::ProxyDown { proxy, how, for_ms } => self.proxy_down(proxy, how, for_ms)?,
            Action::DiskFails { proxy, steps, bytes } => self.members[proxy].host.disk.fail_after(steps, bytes),
            Action::Leave { proxy, for_ms } => {
                let running = self.members[proxy].host.running.lock().clone();
                if let Some(running) = running.filter(|_| self.members[proxy].leaves.is_none()) {
                    running.leaving.send_replace(Leaving::Draining { grace_ms: 500 });
                    self.members[proxy].leaves = Some((now + 500, now + for_ms));
                    self.members[proxy].was_down = true;
                }
            }
            Action::ControlDown { how, for_ms } => self.control_down(how, for_ms),
            Action::Configure => self.configure()?,
            Action::Break => self.break_configuration()?,
            Action::Slow { max_ms } => self.sim.set_max_message_latency(Duration::from_millis(max_ms)),
            Action::Wrong { proxy: Some(proxy), by_ms, for_ms } => {
                self.members[proxy].host.wall.set_wrong(by_ms);
                self.members[proxy].right = Some(now + for_ms);
            }
            Action::Wrong { proxy: None, by_ms, for_ms } => {
                self.control.wall.set_wrong(by_ms);
                self.control_right = Some(now + for_ms);
            }
        }
        Ok(())
    }

    fn proxy_down(&mut self, number: usize, how: Down, for_ms: u64) -> Result<()> {
        let now = self.now();
        let back = now + for_ms;
        let member = &mut self.members[number];
        if member.back.is_some() {
            return Ok(());
        }
        member.was_down = true;
        member.leaves = None;
        member.silent = how == Down::PowerFailed;
        member.back = Some(back);
        let name = member.host.name.clone();
        self.link();
        self.sim.crash(name.as_str());
        let member = &mut self.members[number];
        *member.host.running.lock() = None;
        member.host.disk.go_down(how, &mut self.random);
        let changed_ms = member.changed_ms;
        member.stored = stored(&member.host, member.stored)?;
        // It serves again from what it had, if that was given the time to reach the disk.
        let settled = member.seen.ready && member.stored && changed_ms + STORED_MS <= now;
        member.due = settled.then_some(back + FROM_DISK_MS);
        member.seen = Seen::default();
        Ok(())
    }

    fn control_down(&mut self, how: Down, for_ms: u64) {
        if self.control_back.is_some() {
            return;
        }
        self.control_back = Some(self.now() + for_ms);
        self.control_silent = how == Down::PowerFailed;
        self.link();
        *self.control.running.lock() = None;
        self.control.disk.go_down(how, &mut self.random);
        self.sim.crash(CONTROL);
    }

    /// Brings the network into the state that it should be in.
    fn link(&mut self) {
        let now = self.now();
        let control_silent = self.control_silent && self.control_back.is_some();
        for member in &mut self.members {
            let name = member.host.name.as_str();
            let is_cut = member.cut_until > now || control_silent || (member.silent && member.back.is_some());
            let wanted = match (is_cut, member.held_until > now) {
                (true, _) => Link::Cut,
                (false, true) => Link::Held,
                (false, false) => Link::Open,
            };
            if wanted == member.link {
                continue;
            }
            match member.link {
                Link::Open => {}
                Link::Held => self.sim.release(CONTROL, name),
                Link::Cut => self.sim.repair(CONTROL, name),
            }
            match wanted {
                Link::Open => {}
                Link::Held => self.sim.hold(CONTROL, name),
                Link::Cut => self.sim.partition(CONTROL, name),
            }
            member.link = wanted;
        }
    }

    /// Everything works again.
    fn heal(&mut self) -> Result<()> {
        let now = self.now();
        self.tell("everything works again");
        for number in 0..self.members.len() {
            let member = &mut self.members[number];
            (member.cut_until, member.held_until) = (0, 0);
            member.back = member.back.map(|_| now);
            member.leaves = member.leaves.map(|(gone, _)| (gone, gone.max(now) + 100));
            member.right = member.right.map(|_| now);
        }
        self.control_back = self.control_back.map(|_| now);
        self.control_right = self.control_right.map(|_| now);
        self.sim.set_max_message_latency(Duration::from_millis(LATENCY_MS));
        self.unbreak()
    }

    /// What is due happens, a step of time passes, and what is seen then is judged.
    fn step(&mut self) -> Result<()> {
        let now = self.now();
        if self.control_right.is_some_and(|at| at <= now) {
            self.control.wall.set_wrong(0);
            self.control_right = None;
        }
        if self.control_back.is_some_and(|at| at <= now) {
            self.control_back = None;
            self.link();
            self.sim.bounce(CONTROL);
            self.tell("control is back");
        }
        for number in 0..self.members.len() {
            let member = &mut self.members[number];
            let name = member.host.name.clone();
            if member.right.is_some_and(|at| at <= now) {
                member.host.wall.set_wrong(0);
                member.right = None;
            }
            if member.host.disk.has_failed() {
                self.tell(format!("{name} loses its power"));
                self.proxy_down(number, Down::PowerFailed, 200)?;
                continue;
            }
            if let Some((gone, back)) = member.leaves
                && gone <= now
            {
                let running = member.host.running.lock().clone();
                match running {
                    Some(running) if *running.leaving.borrow() != Leaving::Done => {
                        running.leaving.send_replace(Leaving::Gone { reason: "it stops".into() });
                        running.leaving.send_replace(Leaving::Done);
                    }
                    Some(_) => {}
                    None => {
                        member.leaves = None;
                        member.back = Some(back.max(now));
                    }
                }
            }
            if member.back.is_some_and(|at| at <= now) {
                member.back = None;
                self.link();
                self.sim.bounce(name.as_str());
                self.tell(format!("{name} is back"));
            }
        }
        self.link();
        self.sim.step().map_err(|error| anyhow!("a host failed: {error}"))?;
        self.elapsed_ms.fetch_add(STEP_MS, Relaxed);
        if let Some(panic) = self.panics.lock().first() {
            bail!("a panic: {panic}");
        }
        self.look()
    }

    /// Looks at every proxy, and judges what is seen.
    fn look(&mut self) -> Result<()> {
        let now = self.now();
        for number in 0..self.members.len() {
            let member = &mut self.members[number];
            let name = member.host.name.clone();
            let ends = std::mem::take(&mut *member.host.ends.lock());
            let Some(running) = member.host.running.lock().clone() else {
                ends.iter().for_each(|end| self.trace.push(format!("         {name} ends: {end}")));
                continue;
            };
            let seen = Seen::of(&running);
            let before = std::mem::replace(&mut member.seen, seen.clone());
            let held = running.held.borrow().clone();
            let renewed = held.as_ref().map(|it| it.not_after()) != member.held.as_ref().map(|it| it.not_after());
            member.held = held;
            if seen.ready {
                member.due = None;
            }
            let (due, was_due) = (member.due, member.due.is_some_and(|due| due < now && member.back.is_none()));
            ends.iter().for_each(|end| self.trace.push(format!("         {name} ends: {end}")));
            if seen != before {
                self.members[number].changed_ms = now;
                self.tell(format!("{name} {seen}"));
                seen.may_follow(&before).map_err(|wrong| anyhow!("{name}: {wrong}"))?;
                self.judge(number, &seen, &before)?;
            }
            if renewed {
                self.renewed = true;
                self.tell(format!("{name} has another certificate"));
            }
            let from_disk = self.plan.scenario != Scenario::Clocks && self.plan.scenario != Scenario::Certificates;
            ensure!(!was_due || !from_disk, "{name}: it does not serve from its disk, due at {due:?} ms");
        }
        if self.plan.scenario == Scenario::Certificates && now.is_multiple_of(1_000) {
            self.shake_hands()?;
        }
        Ok(())
    }

    fn judge(&self, number: usize, seen: &Seen, before: &Seen) -> Result<()> {
        let name = &self.members[number].host.name;
        for version in [seen.index, seen.route].into_iter().flatten() {
            ensure!(self.written.contains(&version), "{name}: version {version} was never in force");
        }
        if !seen.ready {
            return Ok(());
        }
        if let Some(frozen) = self.frozen {
            let wrong = [seen.index, seen.route].into_iter().flatten().find(|it| *it != frozen);
            ensure!(wrong.is_none(), "{name}: version {wrong:?} came back, {frozen} is in force");
        }
        let same_life = seen.life == before.life && before.ready;
        if same_life && self.plan.scenario != Scenario::BackAndForth {
            ensure!(seen.index >= before.index, "{name}: its index went back");
            ensure!(seen.route >= before.route, "{name}: its routes went back");
        }
        if same_life && matches!(self.plan.scenario, Scenario::Chaos | Scenario::Remote | Scenario::BackAndForth) {
            let lost = before.web.keys().filter(|it| !seen.web.contains_key(*it));
            for other in lost {
                let up = self.members.iter().any(|it| it.host.name == *other && !it.was_down);
                ensure!(!up, "{name}: {other} was taken from service web, and it never went away");
            }
        }
        Ok(())
    }

    /// Any two proxies that work can shake hands.
    fn shake_hands(&mut self) -> Result<()> {
        let anew = std::mem::take(&mut self.renewed);
        for one in &self.members {
            for other in &self.members {
                let (Some(own), Some(theirs)) = (&one.held, &other.held) else { continue };
                // Those that are down shake no hands; one that was until now has to renew first.
                let works = |it: &Member| it.seen.ready && it.back.is_none();
                if !works(one) || !works(other) {
                    self.renewed = true;
                    continue;
                }
                // Nothing but the time is another than a second ago.
                let now = one.host.wall.now();
                if anew || !theirs.holds_at(now) {
                    admits(own, now, theirs)
                        .map_err(|error| anyhow!("{} does not admit {}: {error}", one.host.name, other.host.name))?;
                }
            }
        }
        Ok(())
    }

    /// Waits until everybody shows the same, and all of it, for so long. Returns when that began.
    fn come_together(&mut self, for_ms: u64) -> Result<u64> {
        let began = self.now();
        let mut since = None;
        loop {
            self.step()?;
            let now = self.now();
            match self.is_together() {
                Ok(()) => {
                    let first = *since.get_or_insert(now);
                    if now >= first + for_ms {
                        self.tell("everything is together");
                        return Ok(first - began);
                    }
                }
                Err(missing) if now > began + TOGETHER_MS => {
                    bail!("not together after {} s: {missing}", TOGETHER_MS / 1000);
                }
                Err(_) => since = None,
            }
        }
    }

    fn is_together(&self) -> Result<(), String> {
        let (mut services, mut web) = (vec!["marker".to_owned(), "web".to_owned()], BTreeMap::new());
        if has_extra(self.version) {
            services.insert(0, "extra".to_owned());
        }
        for member in &self.members {
            if is_other(&member.host) {
                services.push("other".to_owned());
            } else {
                web.insert(member.host.name.clone(), Health::Healthy);
            }
        }
        services.sort();
        for member in &self.members {
            let (name, seen) = (&member.host.name, &member.seen);
            let wanted = Seen {
                life: seen.life,
                ready: true,
                registered: true,
                index: Some(self.version),
                route: Some(self.version),
                services: services.clone(),
                web: web.clone(),
            };
            if *seen != wanted || member.back.is_some() || member.leaves.is_some() {
                return Err(format!("{name} shows: {seen}"));
            }
        }
        Ok(())
    }

    /// What was told in changes is what somebody is told who begins now, down to the versions.
    fn compare_with_a_new_one(&mut self) -> Result<()> {
        self.tell("a new proxy comes");
        self.join(9, "other")?;
        self.come_together(STORED_MS)?;
        let held: Vec<_> = self.members.iter().map(|it| configuration(&it.host)).collect::<Result<_>>()?;
        let Some((new, others)) = held.split_last() else { return Ok(()) };
        for (number, other) in others.iter().enumerate() {
            ensure!(other == new, "p{number} holds {other:?}, a new proxy {new:?}");
        }
        Ok(())
    }

    fn configure(&mut self) -> Result<()> {
        self.version = match self.plan.scenario {
            Scenario::BackAndForth => 1 + self.version % 2,
            _ => self.version + 1,
        };
        self.written.insert(self.version);
        self.unbreak()?;
        self.tell(format!("version {} is written", self.version));
        self.write("mesh.yaml", &documents(self.version, self.plan.scenario.lifetime_s()))
    }

    fn break_configuration(&mut self) -> Result<()> {
        self.is_broken = true;
        self.write("wrong.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: wrong}\nspec: {prots: []}\n")
    }

    fn unbreak(&mut self) -> Result<()> {
        if std::mem::take(&mut self.is_broken) {
            std::fs::remove_file(self.control.config().join("wrong.yaml"))?;
        }
        Ok(())
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let staged = self.control.home.join("staged");
        std::fs::write(&staged, text)?;
        Ok(std::fs::rename(staged, self.control.config().join(name))?)
    }
}

fn is_other(host: &ProxyHost) -> bool {
    host.name == "p9"
}

fn has_extra(version: u16) -> bool {
    version % 2 == 1
}

/// A configuration that shows its version in two of its resources.
fn documents(version: u16, lifetime_s: u32) -> String {
    let marker = MARKED_FROM + version;
    let mut text = format!(
        "apiVersion: sheer.dev/v1alpha1\nkind: Mesh\nmetadata: {{name: mesh}}\n\
         spec: {{certificateLifetime: {lifetime_s}s}}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\n\
         spec: {{ports: [{{port: 80, targetPort: 8080, appProtocol: http}}]}}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {{name: marker}}\nspec: {{ports: [{{port: {marker}}}]}}\n---\n\
         apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: web}}\n\
         spec: {{parentRefs: [{{group: \"\", kind: Service, name: web, port: 80}}], \
         rules: [{{backendRefs: [{{name: marker, port: {marker}}}]}}]}}\n"
    );
    if has_extra(version) {
        text.push_str("---\napiVersion: v1\nkind: Service\nmetadata: {name: extra}\nspec: {ports: [{port: 90}]}\n");
    }
    text
}

/// Whether there is a configuration on a proxy's disk. What was there is still there, whole: the old or the new one.
fn stored(host: &ProxyHost, before: bool) -> Result<bool> {
    let directory = Directory::on(host.disk.clone(), Path::new(STATE))?;
    directory.load(IDENTITY).with_context(|| format!("{}: its identity", host.name))?;
    let found = directory.load(CONFIGURATION).with_context(|| format!("{}: its configuration", host.name))?;
    ensure!(found.is_some() || !before, "{}: its stored configuration is gone", host.name);
    Ok(found.is_some())
}

/// The versions of all that a proxy holds and another would, too.
fn configuration(host: &ProxyHost) -> Result<BTreeMap<(String, String), String>> {
    let directory = Directory::on(host.disk.clone(), Path::new(STATE))?;
    let found = directory.load(CONFIGURATION)?.context("nothing is stored")?;
    let resources = Configuration::decode(found.as_slice())?.resources.into_iter();
    let common = resources.filter_map(|it| {
        let kind = it.resource?.type_url;
        (!kind.ends_with("Workload")).then_some(((kind, it.name), it.version))
    });
    Ok(common.collect())
}
