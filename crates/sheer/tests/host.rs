//! Workloads on real hosts: namespaces, rules, processes. A stand-in takes the proxy's place.

#[path = "host/adopted.rs"]
mod adopted;
#[path = "host/passes.rs"]
mod passes;
#[path = "host/standin.rs"]
mod standin;
#[path = "host/world.rs"]
mod world;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use world::{NOBODY, World, exists, pid, until};

const GET: &str = "curl --silent --show-error --globoff --max-time 10";

fn each(test: impl Fn(&World)) {
    for user in [NOBODY, 0] {
        eprintln!("as user {user}");
        test(&World::of(user));
    }
}

#[test]
fn all_that_the_command_sends_is_captured_with_its_destination() {
    each(|world| {
        let script = format!(
            "{GET} http://240.0.0.7:8080/; {GET} http://[fd99::5]:81/; {GET} http://api/; {GET} http://10.77.0.1:99/; id -u"
        );
        let (status, out, err) = world.finish(world.workload("run web", Some(&script)));
        assert!(status.success(), "{err}");
        let lines: Vec<&str> = out.lines().collect();
        for (line, to) in lines.iter().zip(["240.0.0.7:8080", "[fd99::5]:81", "240.0.0.9:80", "10.77.0.1:99"]) {
            assert!(line.starts_with(&format!("outbound to={to} ")), "{to}: {out}{err}");
        }
        assert_eq!(lines[4], NOBODY.to_string(), "never root unless asked: {out}");
    });
}

#[test]
fn other_udp_is_refused_and_counted() {
    let world = World::of(0);
    let script = "bash -c 'echo x > /dev/udp/240.0.0.7/123' || echo refused; touch /tmp/$PPID; echo asked; sleep 1000";
    let running = world.start(world.workload("run web --user root", Some(script)));
    running.says("asked");
    assert!(running.out().contains("refused"), "{}{}", running.out(), running.err());
    let mut count = world.sheer("exec web-1 -- nft list counter inet sheer refused_udp");
    count.stdin(std::process::Stdio::null());
    let (_, counter, complaint) = world.finish(count);
    assert!(counter.contains("packets 1 "), "{counter}{complaint}");
}

#[test]
fn names_are_the_meshs_own() {
    each(|world| {
        let (_, out, err) = world.finish(world.workload(
            "run shop/web",
            Some("cat /etc/resolv.conf; grep '^hosts' /etc/nsswitch.conf; getent ahostsv4 anything.example"),
        ));
        assert!(out.contains("search shop.svc.mesh.internal svc.mesh.internal mesh.internal"), "{out}{err}");
        assert!(out.contains("options ndots:3"), "{out}");
        assert!(out.contains("hosts: files dns"), "{out}");
        assert!(out.contains("240.0.0.9"), "{out}{err}");
        assert!(!fs::read_to_string("/etc/resolv.conf").unwrap().contains("Written by sheer"));
    });
}

#[test]
fn status_and_signals_pass_through() {
    let world = World::of(NOBODY);
    for (script, status) in
        [("exit 3", 3), ("kill -SEGV $$", 139), ("kill -KILL $$", 137), ("exec /nowhere/at/all", 127), ("exit 0", 0)]
    {
        let (ended, _, err) = world.finish(world.workload("run web", Some(script)));
        assert_eq!(ended.code(), Some(status), "{script}: {err}");
    }
    let mut missing = world.workload("run web", None);
    missing.args(["--", "no-such-program"]);
    let (ended, _, err) = world.finish(missing);
    assert_eq!(ended.code(), Some(127), "{err}");
    assert!(err.contains("cannot start 'no-such-program': there is no such program"), "{err}");

    let script = "trap 'echo usr1' USR1; trap 'echo hup; exit 7' HUP; echo up; while :; do sleep 0.05; done";
    let mut running = world.start(world.workload("run web", Some(script)));
    running.says("up");
    running.signal(Signal::SIGUSR1);
    running.says("usr1");
    running.signal(Signal::SIGHUP);
    assert_eq!(running.wait().code(), Some(7), "{}", running.err());
}

#[test]
fn stopping_drains_before_the_command_is_told() {
    let world = World::of(NOBODY);
    let script = "trap 'echo told; exit 0' TERM; echo up; while :; do sleep 0.05; done";
    let mut running = world.start(world.workload("run web", Some(script)));
    running.says("up");
    running.signal(Signal::SIGTERM);
    running.says("stand-in: Drain");
    assert!(!running.out().contains("told"), "the proxy is told first");
    assert_eq!(running.wait().code(), Some(0), "{}", running.err());
    assert!(running.out().contains("told"), "{}", running.err());

    let mut running = world.start(world.workload("run web", Some("echo up; sleep 1000")));
    running.says("up");
    running.signal(Signal::SIGTERM);
    running.says("stand-in: Drain");
    running.signal(Signal::SIGTERM);
    assert_eq!(running.wait().code(), Some(143), "asked twice: at once; {}", running.err());
}

#[test]
fn a_terminals_signal_reaches_the_command_once() {
    let world = World::of(NOBODY);
    let terminal = nix::pty::openpty(None, None).unwrap();
    let script = "n=0; trap 'n=$((n+1)); echo got $n' INT; echo up; while [ $n = 0 ]; do sleep 0.05; done; \
                  i=0; while [ $i -lt 10 ]; do sleep 0.05; i=$((i+1)); done; echo total $n; tty; exit 5";
    let workload = world.workload("run web", Some(script));
    let mut command = world.as_user(world.user, "setsid");
    command.args(["--ctty", "--wait", "env"]);
    for (name, value) in workload.get_envs().filter_map(|(name, value)| Some((name, value?))) {
        command.env(name, value);
    }
    let words: Vec<_> = workload.get_args().collect();
    let begin = words.iter().position(|word| word.to_string_lossy().ends_with("/sheer")).unwrap();
    command.args(&words[begin..]);
    let stream = || terminal.slave.try_clone().unwrap();
    command.stdin(stream()).stdout(stream()).stderr(stream());
    let mut child = command.spawn().unwrap();
    drop((command, terminal.slave));
    let mut master = fs::File::from(terminal.master);
    let (mut seen, mut buffer, mut sent) = (String::new(), [0; 1024], false);
    // The terminal hangs up (EIO) when its last user has ended.
    while let Ok(length @ 1..) = master.read(&mut buffer) {
        seen.push_str(&String::from_utf8_lossy(&buffer[..length]));
        if !sent && seen.contains("up") {
            master.write_all(b"\x03").unwrap();
            sent = true;
        }
    }
    assert!(seen.contains("total 1") && seen.contains("/dev/pts/"), "{seen}");
    assert_eq!(child.wait().unwrap().code(), Some(5), "{seen}");
}

#[test]
fn a_killed_proxy_is_replaced_under_the_living_command() {
    each(|world| {
        let script = "echo up $$; exec python3 -m http.server 8081 --bind 127.0.0.1";
        let running = world.start(world.workload("run api --port 8081 --publish 8080=8081", Some(script)));
        running.says("up");
        let fetch = || {
            let mut get = world.as_root("curl");
            get.args(["-s", "-o", "/dev/null", "-w", "%{http_code}", "http://localhost:8080/"]);
            world.finish(get).1
        };
        until("the application to be published", || (fetch() == "200").then_some(()));
        assert!(running.err().contains("127.0.0.6 - - "), "delivered from its own address: {}", running.err());
        let first = pid(&world.record("default_api-1"), "proxy");
        kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
        until("another proxy", || (pid(&world.record("default_api-1"), "proxy") != first).then_some(()));
        // No wait here: the listening sockets never closed.
        assert_eq!(fetch(), "200");
        assert_eq!(running.out().matches("up").count(), 1, "the command is the same");
    });
}

#[test]
fn a_killed_supervisor_leaves_nothing() {
    each(|world| {
        let mark = format!("sleep 7{}", std::process::id() + world.user);
        let script = format!("{mark} & setsid {mark} & (setsid {mark} &); echo up; {mark}");
        let mut running = world.start(world.workload("run api --port 8081", Some(&script)));
        running.says("up");
        until("four of them", || (world.processes(&mark).len() >= 4).then_some(()));
        let record = world.record("default_api-1");
        kill(Pid::from_raw(pid(&record, "supervisor")), Signal::SIGKILL).unwrap();
        running.wait();
        until("no process of it", || world.processes(&mark).is_empty().then_some(()));
        let runs = if world.user == 0 { world.inside("/run/sheer/run") } else { world.path("run/sheer/run") };
        until("no run directory", || (!exists(&runs.join("default_api-1"))).then_some(()));
        let gone = |of| {
            !exists(std::path::Path::new(&format!("/proc/{}/ns/net", pid(&record, of)))) || zombie(pid(&record, of))
        };
        until("no keeper", || gone("keeper").then_some(()));
        until("no proxy", || gone("proxy").then_some(()));
    });
}

fn zombie(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|text| text.contains(") Z "))
}

#[test]
fn what_was_killed_together_is_cleaned_up() {
    let world = World::of(NOBODY);
    let mut running = world.start(world.workload("run api", Some("echo up; sleep 1000")));
    running.says("up");
    let record = world.record("default_api-1");
    // Stopped first, so that neither cleans up after the other.
    kill(Pid::from_raw(pid(&record, "supervisor")), Signal::SIGSTOP).unwrap();
    kill(Pid::from_raw(pid(&record, "keeper")), Signal::SIGKILL).unwrap();
    kill(Pid::from_raw(pid(&record, "supervisor")), Signal::SIGKILL).unwrap();
    running.wait();
    let (status, out, err) = world.finish(world.sheer("clean"));
    assert!(status.success() && out.contains("removed what default/api-1 left"), "{out}{err}");
    assert!(!exists(&world.path("run/sheer/run/default_api-1")));
    let keeper = pid(&record, "keeper");
    until("no keeper", || (zombie(keeper) || !exists(std::path::Path::new(&format!("/proc/{keeper}")))).then_some(()));
    assert_eq!(world.finish(world.sheer("clean")).1, "nothing to clean\n");
}

#[test]
fn several_workloads_of_a_service_are_numbered() {
    let world = World::of(NOBODY);
    let start = |arguments: &str| {
        let running = world.start(world.workload(arguments, Some("echo up; sleep 1000")));
        running.says("up");
        running
    };
    let _first = start("run api --port 80");
    let second = start("run api --port 80");
    assert!(second.err().contains("default/api-2 is ready"), "{}", second.err());
    let (status, _, err) = world.finish(world.workload("run api --name api-2", Some("true")));
    assert!(!status.success() && err.contains("default/api-2 runs already"), "{err}");
    let (_, _, err) = world.finish(world.sheer("exec api-3 -- true"));
    assert!(err.contains("running: default/api-1, default/api-2"), "{err}");
}

#[test]
fn a_namespace_that_exists_is_used_and_left_as_it_was() {
    let world = World::of(0);
    let root = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let mut command = world.as_root(words[0]);
        command.args(&words[1..]);
        let (status, out, err) = world.finish(command);
        assert!(status.success(), "{line}: {err}");
        out
    };
    root("ip netns add blue");
    root("ip -n blue link set lo up");
    let look = || {
        let parts = ["ip -n blue address", "ip -n blue -4 route show table all", "ip -n blue -6 route show table all"];
        parts.map(&root).join("") + &root("ip netns exec blue nft list ruleset")
    };
    let before = look();
    let script = format!("{GET} http://240.0.0.7:8080/; {GET} http://[fd99::5]:81/; echo up; sleep 1000");
    let mut running = world.start(world.workload("run web --netns blue", Some(&script)));
    running.says("up");
    assert!(running.out().contains("outbound to=240.0.0.7:8080"), "{}{}", running.out(), running.err());
    assert!(running.out().contains("outbound to=[fd99::5]:81"), "{}{}", running.out(), running.err());
    assert_ne!(look(), before);
    let (_, _, err) = world.finish(world.workload("run web --netns blue", Some("echo started")));
    assert!(err.contains("another workload captures"), "{err}");
    kill(Pid::from_raw(pid(&world.record("default_web-1"), "supervisor")), Signal::SIGKILL).unwrap();
    running.wait();
    until("the namespace to be as before", || (look() == before).then_some(()));
    let (_, _, err) = world.finish(world.workload("run web --netns red", Some("echo started")));
    assert!(err.contains("there is no network namespace /run/netns/red"), "{err}");
}

#[test]
fn exec_sees_the_world_as_the_workload_does() {
    each(|world| {
        let running = world.start(world.workload("run api", Some("echo up; sleep 1000")));
        running.says("up");
        let mut inside = world.sheer("exec api-1 --");
        inside.args(["sh", "-c", &format!("{GET} http://web/; id -u; ip -o link | wc -l; exit 9")]);
        let (status, out, err) = world.finish(inside);
        assert_eq!(status.code(), Some(9), "{err}");
        let lines: Vec<&str> = out.lines().collect();
        assert!(lines[0].starts_with("outbound to=240.0.0.9:80"), "{out}{err}");
        assert_eq!(lines[1..], [&NOBODY.to_string(), "1"], "{out}");
    });
}

#[test]
fn ports_of_the_host_are_let_through_by_name_alone() {
    let world = World::of(NOBODY);
    let script =
        format!("{GET} http://127.0.0.1:5432/; {GET} http://[::1]:5432/; {GET} http://127.0.0.1:5433/ || echo no");
    let (_, out, err) = world.finish(world.workload("run web --host-port 5432", Some(&script)));
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0].starts_with("outbound to=127.0.0.1:5432"), "{out}{err}");
    assert!(lines[1].starts_with("outbound to=[::1]:5432"), "{out}{err}");
    assert_eq!(lines[2], "no", "{out}");
}

#[test]
fn keys_are_out_of_the_commands_reach() {
    each(|world| {
        let state = world.path("state");
        let (_, out, err) =
            world.finish(world.workload("run web", Some(&format!("ls -A {}/default | wc -l", state.display()))));
        assert_eq!(out, "0\n", "{err}");
        assert!(exists(&state.join("default/web-1")));
    });
}

#[test]
fn all_ports_of_its_own_network_are_the_workloads() {
    let world = World::of(NOBODY);
    let running =
        world.start(world.workload("run web --port 80 --publish 8080=80", Some("exec python3 -m http.server 80")));
    running.says("is ready");
    let listens = "until ss -Hltn sport = :80 | grep -q .; do sleep 0.05; done; echo listens";
    let mut inside = world.sheer("exec web-1 --");
    inside.args(["timeout", "20", "sh", "-c", listens]);
    let (_, out, err) = world.finish(inside);
    assert_eq!(out, "listens\n", "{err}{}", running.err());
}

#[test]
fn upstreams_listen_inside() {
    let world = World::of(NOBODY);
    let script = format!("{GET} http://127.0.0.1:6379/");
    let (_, out, err) =
        world.finish(world.workload("run web --upstream 127.0.0.1:6379=shop/redis:6380", Some(&script)));
    assert!(out.starts_with("upstream shop/redis:6380 "), "{out}{err}");
}

#[test]
fn env_leads_to_the_forward_proxy_with_a_secret() {
    let world = World::of(NOBODY);
    let script = format!("{GET} http://api/x; env | grep -i _proxy");
    let (_, out, err) = world.finish(world.workload("run web --capture env", Some(&script)));
    assert!(out.starts_with("forward login=true"), "{out}{err}");
    assert!(out.contains("ALL_PROXY=socks5h://") && out.contains("NO_PROXY=localhost"), "{out}");
    assert!(err.contains("goes around the mesh"), "{err}");
}

#[test]
fn what_is_wrong_is_said_with_its_remedy() {
    let world = World::of(NOBODY);
    let refused = |command: std::process::Command, expected: &str| {
        let (status, out, err) = world.finish(command);
        assert!(!status.success() && status.signal().is_none() && out.is_empty(), "{out}{err}");
        assert!(err.contains(expected), "'{expected}' is not in\n{err}");
    };
    let mut fails = world.workload("run web", Some("echo started"));
    fails.env("STANDIN_FAILS", "the token is spent; make another by 'sheer token create'");
    refused(fails, "the token is spent");
    refused(
        world.workload("run web --port 80 --publish 80", Some("echo started")),
        "only root may listen on ports below 1024",
    );
    refused(world.workload("run web --join-token-file /nowhere", Some("echo started")), "sheer token create");
    refused(world.workload("run web --user root", Some("echo started")), "only root can run a command as user 'root'");
    refused(world.workload("proxy web --unit nginx", None), "needs root");
    let _taken = world.start(world.workload("run a --port 80 --publish 8080=80", Some("sleep 1000")));
    _taken.says("is ready");
    refused(
        world.workload("run b --port 80 --publish 8080=80", Some("echo started")),
        "something listens there already",
    );

    // A machine that allows no more user namespaces.
    let workload = world.workload("run web", Some("echo started"));
    let words: Vec<_> = workload.get_args().map(ToOwned::to_owned).collect();
    let begin = words.iter().position(|word| word.to_string_lossy().ends_with("/sheer")).unwrap();
    let mut forbidden = world.as_user(NOBODY, "unshare");
    forbidden.args(["--user", "--map-user=1234", "--map-group=1234", "--keep-caps", "sh", "-c"]);
    forbidden.arg("echo 0 > /proc/sys/user/max_user_namespaces && chmod 700 $XDG_RUNTIME_DIR && exec \"$@\"").arg("sh");
    forbidden.args(&words[begin..]);
    refused(forbidden, "sysctl -w user.max_user_namespaces");

    assert!(world.as_root("mount").args(["--bind", "/dev/null", "/usr/sbin/nft"]).status().unwrap().success());
    refused(world.workload("run web", Some("echo started")), "apt install nftables");
    assert!(!exists(&world.path("run/sheer/run/default_web-1")), "nothing is left of a failed start");
}
