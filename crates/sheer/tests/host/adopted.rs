//! Workloads that run already, in a network that they share.

use crate::world::{NOBODY, Running, World, exists, pid, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sheer_proxy::plan::PROXY_USER;
use std::fs;
use std::path::PathBuf;

/// A host with control groups of its own, and an application in one of them.
struct Host {
    world: World,
    groups: PathBuf,
}

impl Host {
    fn new(mark: &str) -> Self {
        let world = World::of(0);
        assert!(world.as_root("mount").args(["-t", "cgroup2", "none", "/sys/fs/cgroup"]).status().unwrap().success());
        let groups = world.inside("/sys/fs/cgroup").join(format!("sheer-{mark}-{}", std::process::id()));
        fs::create_dir(&groups).unwrap();
        Self { world, groups }
    }

    /// A shell script in a control group, as a unit would run it.
    fn unit(&self, name: &str, script: &str) -> Running {
        let group = self.groups.join(name);
        fs::create_dir_all(&group).unwrap();
        let inside = group.strip_prefix(self.world.inside("/")).unwrap();
        let enter = format!(
            "echo $$ > /{}/cgroup.procs && exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups sh -c '{script}'",
            inside.display()
        );
        let mut command = self.world.as_root("sh");
        command.args(["-c", &enter]);
        self.world.start(command)
    }

    fn get(&self, user: u32, arguments: &str) -> String {
        let mut get = self.world.as_user(user, "curl");
        get.args(["-sS", "--globoff", "--max-time", "10"]).args(arguments.split(' '));
        let (_, out, err) = self.world.finish(get);
        out + &err
    }

    fn rules(&self) -> String {
        String::from_utf8(self.world.as_root("nft").args(["list", "ruleset"]).output().unwrap().stdout).unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let children =
            || fs::read_dir(&self.groups).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir());
        for child in children() {
            let _ = fs::write(child.path().join("cgroup.kill"), "1");
        }
        let gone = || children().all(|child| fs::remove_dir(child.path()).is_ok());
        until("the groups to be empty", || gone().then_some(()));
        let _ = fs::remove_dir(&self.groups);
    }
}

const APPLICATION: &str = "exec python3 -m http.server PORT";

#[test]
fn three_units_of_a_host_are_adopted_at_once() {
    let host = Host::new("three");
    let world = &host.world;
    let mut running = Vec::new();
    for (name, port) in [("one", "8001"), ("two", "8002"), ("three", "8003")] {
        running.push(host.unit(&format!("{name}.service"), &APPLICATION.replace("PORT", port)));
        let arguments = format!("proxy {name} --port {port} --unit {name} --mode permissive");
        let proxy = world.start(world.workload(&arguments, None));
        proxy.says("is ready");
        running.push(proxy);
    }
    until("all three rules", || (host.rules().matches("socket cgroupv2").count() == 9).then_some(()));
    until("the applications", || host.get(0, "http://127.0.0.1:8003/").contains("<html").then_some(()));

    // From outside a unit: what arrives at a port goes to its proxy, other traffic is nobody's business.
    let proxies: Vec<i32> =
        ["one", "two", "three"].map(|name| pid(&world.record(&format!("default_{name}-1")), "proxy")).into();
    assert!(host.get(0, "http://10.77.0.1:8001/").starts_with("inbound "));
    assert!(host.get(0, "http://10.77.0.1:8001/").contains(&format!("pid={}\n", proxies[0])));
    assert!(host.get(0, "http://10.77.0.1:8002/").contains(&format!("pid={}\n", proxies[1])));

    // From inside one: to its own proxy, also when it calls itself or a neighbour.
    let script = |line: &str| format!("for url in {line}; do curl -sS --max-time 10 $url; done; echo done; sleep 1000");
    let asks = host.unit(
        "one.service",
        &script("http://240.0.0.1/ http://10.77.0.1:8001/ http://10.77.0.1:8002/ http://any.name/"),
    );
    asks.says("done");
    let lines: Vec<String> = asks.out().lines().map(Into::into).collect();
    for (line, to) in lines.iter().zip(["240.0.0.1:80", "10.77.0.1:8001", "10.77.0.1:8002", "240.0.0.9:80"]) {
        assert!(line.starts_with(&format!("outbound to={to} ")), "{to}: {lines:?}");
        assert!(line.ends_with(&format!("pid={}", proxies[0])), "{to}: {lines:?}");
    }

    // A proxy that dials a workload of this host reaches that one's inbound port, and its delivery the application.
    assert!(host.get(PROXY_USER, "http://10.77.0.1:8001/").starts_with("inbound "));
    assert!(host.get(PROXY_USER, "--interface 127.0.0.6 http://10.77.0.1:8001/").contains("<html"));

    for mut proxy in running.into_iter().skip(1).step_by(2) {
        proxy.signal(Signal::SIGTERM);
        assert!(proxy.wait().success(), "{}", proxy.err());
    }
    assert_eq!(host.rules(), "", "nothing is left");
}

#[test]
fn a_unit_that_starts_later_or_again_is_followed() {
    let host = Host::new("again");
    let world = &host.world;
    let group = host.groups.join("late.service");
    let path = PathBuf::from("/").join(group.strip_prefix(world.inside("/sys/fs/cgroup")).unwrap());
    let proxy = world
        .start(world.workload(&format!("proxy late --port 8001 --cgroup {} --mode permissive", path.display()), None));
    proxy.says("as soon as it is there");
    let script = "echo here; read line; curl -sS --max-time 10 http://240.0.0.1/; sleep 1000";
    for _ in 0..2 {
        let before = host.rules();
        fs::create_dir(&group).unwrap();
        until("rules for the new group", || {
            (host.rules() != before && host.rules().contains("socket cgroupv2")).then_some(())
        });
        let unit = host.unit("late.service", &script.replace("read line; ", ""));
        unit.says("outbound to=240.0.0.1:80");
        fs::write(group.join("cgroup.kill"), "1").unwrap();
        until("the group to end", || fs::remove_dir(&group).is_ok().then_some(()));
        until("rules without it", || (!host.rules().contains("late.service")).then_some(()));
    }
}

#[test]
fn watching_leaves_names_and_udp_alone() {
    let host = Host::new("watch");
    let world = &host.world;
    let proxy = world.start(world.workload(&format!("proxy old --port 8001 --user {NOBODY}"), None));
    proxy.says("is ready");
    until("the rules", || host.rules().contains("meta skuid 65534").then_some(()));
    assert!(!host.rules().contains("dport 53 counter") && !host.rules().contains("reject"), "{}", host.rules());
    assert!(host.get(NOBODY, "http://240.0.0.1/").starts_with("outbound to=240.0.0.1:80"));
}

#[test]
fn rules_go_with_a_killed_supervisor() {
    let host = Host::new("killed");
    let world = &host.world;
    let mut proxy = world.start(world.workload("proxy old --port 8001 --capture here --mode strict", None));
    proxy.says("is ready");
    until("the rules", || host.rules().contains("sheer-default-old-1").then_some(()));
    assert!(host.get(0, "http://240.0.0.1/").starts_with("outbound to=240.0.0.1:80"));
    assert!(
        host.get(0, "http://10.77.0.1:8001/").starts_with("inbound ")
            || host.get(0, "http://10.77.0.1:8001/").starts_with("outbound ")
    );
    assert!(!host.get(PROXY_USER, "http://240.0.0.1/").contains("outbound"));
    let record = world.record("default_old-1");
    kill(Pid::from_raw(pid(&record, "supervisor")), Signal::SIGKILL).unwrap();
    proxy.wait();
    until("no rules", || host.rules().is_empty().then_some(()));
    until("no run directory", || (!exists(&world.inside("/run/sheer/run/default_old-1"))).then_some(()));
}

#[test]
fn virtual_addresses_get_a_route_where_the_host_has_none() {
    let host = Host::new("route");
    let world = &host.world;
    assert!(world.as_root("ip").args(["route", "delete", "default"]).status().unwrap().success());
    let routes = || String::from_utf8(world.as_root("ip").arg("route").output().unwrap().stdout).unwrap();
    let before = routes();
    let start = |name: &str, port: u16| {
        let arguments = format!("proxy {name} --port {port} --user {} --mode permissive", NOBODY - u32::from(port));
        let proxy = world.start(world.workload(&arguments, None));
        proxy.says("is ready");
        proxy
    };
    let mut first = start("one", 1);
    let mut second = start("two", 2);
    until("both rules", || (host.rules().matches("sheer-default-").count() == 2).then_some(()));
    assert!(host.get(NOBODY - 1, "http://240.240.0.1/").starts_with("outbound to=240.240.0.1:80"), "{}", routes());
    first.signal(Signal::SIGTERM);
    assert!(first.wait().success());
    assert!(
        host.get(NOBODY - 2, "http://240.240.0.1/").starts_with("outbound to=240.240.0.1:80"),
        "it stays for the other"
    );
    second.signal(Signal::SIGTERM);
    assert!(second.wait().success());
    assert_eq!(routes(), before);
}
