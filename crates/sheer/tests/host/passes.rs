//! What passes through the supervisor as if it were not there: docs/run.md, "What passes through".

use crate::world::{NOBODY, World};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::Signal;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::Duration;

#[test]
fn standard_streams_are_the_commands_own() {
    let world = World::of(NOBODY);
    let mut workload = world.workload("run web", Some("cat; echo 'of the command' >&2"));
    let err = world.path("err.streams");
    workload.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&err).unwrap());
    let mut running = workload.spawn().unwrap();
    // More than a pipe holds, and every value of a byte.
    let sent: Vec<u8> = (0..1_000_000u32).map(|number| (number % 251) as u8 ^ (number >> 12) as u8).collect();
    let (mut input, mut output) = (running.stdin.take().unwrap(), running.stdout.take().unwrap());
    let mut got = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            input.write_all(&sent).unwrap();
            drop(input);
        });
        output.read_to_end(&mut got).unwrap();
    });
    assert!(got == sent, "{} bytes came back of {}", got.len(), sent.len());
    assert_eq!(running.wait().unwrap().code(), Some(0));
    let complaints = std::fs::read_to_string(err).unwrap();
    assert!(complaints.contains("of the command\n") && complaints.contains("is ready"), "{complaints}");
}

#[test]
fn a_command_that_cannot_be_started_has_the_status_that_shells_give() {
    let world = World::of(NOBODY);
    let mut file = world.workload("run web", None);
    file.args(["--", "/etc/passwd"]);
    let (ended, _, err) = world.finish(file);
    assert_eq!(ended.code(), Some(126), "{err}");
    assert!(err.contains("cannot start '/etc/passwd'"), "{err}");
    let mut fails = world.workload("run web", Some("echo started"));
    fails.env("STANDIN_FAILS", "the proxy cannot start");
    let (ended, out, err) = world.finish(fails);
    assert_eq!((ended.code(), out.as_str()), (Some(1), ""), "{err}");
}

#[test]
fn every_signal_that_is_promised_is_passed_on() {
    let world = World::of(NOBODY);
    let script = "for name in HUP INT QUIT USR1 USR2 WINCH ALRM; do trap \"echo got $name\" $name; done; \
                  trap 'echo got TERM; exit 8' TERM; echo up; while :; do sleep 0.05; done";
    let mut running = world.start(world.workload("run web", Some(script)));
    running.says("up");
    for signal in [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGWINCH,
        Signal::SIGALRM,
    ] {
        running.signal(signal);
        running.says(&format!("got {}\n", signal.as_str().trim_start_matches("SIG")));
    }
    running.signal(Signal::SIGTERM);
    running.says("stand-in: Drain");
    running.signal(Signal::SIGTERM);
    assert_eq!(running.wait().code(), Some(8), "{}", running.err());
    assert_eq!(running.out().matches("got").count(), 8, "each once: {}", running.out());
}

/// Ctrl-Z stops the whole job, `fg` lets it go on, Ctrl-\ quits it.
#[test]
fn a_shell_controls_the_job() {
    let world = World::of(NOBODY);
    let terminal = nix::pty::openpty(None, None).unwrap();
    let script = "trap 'echo quits; exit 6' QUIT; trap 'echo goes on' CONT; echo up; while :; do sleep 0.05; done";
    let workload = world.workload("run web", Some(script));
    let words: Vec<_> = workload.get_args().collect();
    let begin = words.iter().position(|word| word.to_string_lossy().ends_with("/sheer")).unwrap();
    let shell = "\"$@\"; echo \"stopped with $?\"; fg > /dev/null; echo \"ended with $?\"";
    let mut command = world.as_user(world.user, "setsid");
    command.args(["--ctty", "--wait", "bash", "-mc", shell, "bash"]).args(&words[begin..]);
    for (name, value) in workload.get_envs().filter_map(|(name, value)| Some((name, value?))) {
        command.env(name, value);
    }
    let stream = || terminal.slave.try_clone().unwrap();
    command.stdin(stream()).stdout(stream()).stderr(stream());
    let mut child = command.spawn().unwrap();
    drop((command, terminal.slave));
    let mut master = File::from(terminal.master);
    let (mut seen, mut buffer) = (String::new(), [0; 1024]);
    // What is typed when this is seen.
    let mut typed = [("up\r\n", "\x1a"), ("goes on", "\x1c")].into_iter().peekable();
    loop {
        let mut waits = [PollFd::new(master.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut waits, 30_000u16), Ok(1), "nothing more comes after {seen}");
        // The terminal hangs up (EIO) when its last user has ended.
        let Ok(length @ 1..) = master.read(&mut buffer) else { break };
        seen.push_str(&String::from_utf8_lossy(&buffer[..length]));
        if let Some((_, key)) = typed.next_if(|(text, _)| seen.contains(text)) {
            master.write_all(key.as_bytes()).unwrap();
        }
    }
    assert!(seen.contains("stopped with 148") && seen.contains("quits") && seen.contains("ended with 6"), "{seen}");
    assert!(child.wait().unwrap().success(), "{seen}");
}

#[test]
fn the_command_runs_as_the_user_and_group_that_were_named() {
    let world = World::of(0);
    let id = |arguments: &str| {
        let script = "echo $(id -u) $(id -g) $(id -G) $USER $LOGNAME $HOME; grep NoNewPrivs /proc/self/status >&2";
        let (status, out, err) = world.finish(world.workload(&format!("run web {arguments}"), Some(script)));
        assert!(status.success(), "{err}");
        out
    };
    // As in every Debian: games is user 5 of group 60, nogroup is 65534.
    assert_eq!(id("--user games"), "5 60 60 games games /usr/games\n");
    assert_eq!(id("--user games --group nogroup"), "5 65534 65534 games games /usr/games\n");
    assert_eq!(id("--user 4242 --group 60"), "4242 60 60 4242 4242 /\n");
    assert_eq!(id("--user root"), "0 0 0 root root /root\n");
    assert!(id("").starts_with(&format!("{NOBODY} {NOBODY} ")), "nobody, where nobody called sudo");
    for (arguments, complaint) in [
        ("--user no-such-user", "there is no user 'no-such-user' on this machine"),
        ("--group no-such-group", "there is no group 'no-such-group' on this machine"),
    ] {
        let (status, out, err) = world.finish(world.workload(&format!("run web {arguments}"), Some("echo started")));
        assert!(!status.success() && out.is_empty() && err.contains(complaint), "{out}{err}");
    }
    let person = World::of(NOBODY);
    let (_, out, err) = person.finish(person.workload("run web --group root", Some("echo started")));
    assert!(out.is_empty() && err.contains("only root can run a command as group 'root'"), "{out}{err}");
}

#[test]
fn systemd_is_told_what_the_command_says_and_when_it_stops() {
    let world = World::of(NOBODY);
    let systemd = Systemd::new(&world);
    let notifies = format!("{} __notifies; sleep 1000", world.path("test").display());
    let mut workload = systemd.surround(world.workload("run web", Some(&notifies)));
    workload.env("STANDIN_NOTIFIES", "1");
    let running = world.start(workload);
    assert_eq!(systemd.hears(), "READY=1\nSTATUS=serving", "but not the main process; {}", running.err());
    running.signal(Signal::SIGTERM);
    assert_eq!(systemd.hears(), "STOPPING=1", "{}", running.err());

    // Without a command the proxy itself is what is ready.
    let alone = world.start(systemd.surround(world.workload("proxy db --capture none --port 5432", None)));
    assert_eq!(systemd.hears(), "READY=1", "{}", alone.err());
    alone.signal(Signal::SIGTERM);
    assert_eq!(systemd.hears(), "STOPPING=1", "{}", alone.err());
}

/// Where systemd would listen for the unit.
struct Systemd {
    socket: UnixDatagram,
    place: std::path::PathBuf,
}

impl Systemd {
    fn new(world: &World) -> Self {
        let place = world.path("home/notify");
        let socket = UnixDatagram::bind(&place).unwrap();
        std::os::unix::fs::chown(&place, Some(NOBODY), None).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Self { socket, place }
    }

    fn surround(&self, mut command: Command) -> Command {
        command.env("NOTIFY_SOCKET", &self.place);
        command
    }

    fn hears(&self) -> String {
        let mut message = [0; 256];
        let length = self.socket.recv(&mut message).unwrap_or(0);
        String::from_utf8_lossy(&message[..length]).into_owned()
    }
}
