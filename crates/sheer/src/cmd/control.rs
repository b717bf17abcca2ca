//! `sheer control`: the control plane as a service, its backup and its restore.

use crate::client::{Absent, Connect};
use crate::dirs::{self, Dirs};
use crate::output::{self, Progress};
use anyhow::{Context as _, bail};
use sheer_control::{ControlPlane, Options};
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

/// Flags of `sheer control`.
#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  sheer control --config /etc/sheer/mesh.d --state /var/lib/sheer
  sheer control --proxy-listen 10.0.0.5:15012 --advertise mesh.example.com:15012
  sheer control backup -o sheer.backup
  sheer control restore -i sheer.backup"
)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    place: Place,

    /// Where proxies of other hosts connect
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:15012")]
    proxy_listen: Vec<SocketAddr>,

    /// Where the API and its page listen; port 0 picks a free one
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:15080")]
    api_listen: SocketAddr,

    /// How other hosts reach this control plane, written into join tokens [default: this host's address]
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Vec<String>,
}

/// Where a control plane keeps its things; `sheer up` shares it.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Place {
    /// The directory of YAML files; a saved change is in force at once [default: the user's, see docs/defaults.md]
    #[arg(long, value_name = "DIR")]
    pub(crate) config: Option<PathBuf>,

    /// Where root key, registrations and tokens are kept [default: the user's, see docs/defaults.md]
    #[arg(long, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,

    /// Where the sockets for this host's proxies and command line are made [default: the user's]
    #[arg(long, value_name = "DIR")]
    pub(crate) sockets: Option<PathBuf>,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Write everything that a new machine needs to take over, also while the control plane runs
    Backup(Backup),
    /// Put a backup in place on a machine that has no state yet
    Restore(Restore),
}

#[derive(clap::Args)]
#[command(after_help = "Examples:
  sheer control backup -o sheer.backup       # holds the root key: keep it as you keep that")]
struct Backup {
    /// The file to write (mode 0600)
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// The state to read when no control plane runs [default: the user's]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,

    /// Its configuration directory [default: the user's]
    #[arg(long, value_name = "DIR")]
    config: Option<PathBuf>,

    #[command(flatten)]
    connect: Connect,
}

#[derive(clap::Args)]
#[command(after_help = "Examples:
  sheer control restore -i sheer.backup
  sheer control restore -i sheer.backup --state /srv/sheer --config /srv/sheer/mesh.d")]
struct Restore {
    /// The file to read
    #[arg(short, long, value_name = "FILE")]
    input: PathBuf,

    /// The state directory to make [default: the user's]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,

    /// The configuration directory to fill [default: the user's]
    #[arg(long, value_name = "DIR")]
    config: Option<PathBuf>,
}

/// Runs until SIGTERM or SIGINT.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Some(Command::Backup(args)) => return backup(&args),
        Some(Command::Restore(args)) => return restore(&args),
        None => {}
    }
    let options = args.place.options(args.proxy_listen, args.api_listen, args.advertise)?;
    serve(options, |plane, options| {
        let listening =
            |addresses: &[SocketAddr]| addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        tracing::info!(
            proxies = %listening(plane.proxy_addresses()),
            api = %listening(plane.api_address().as_slice()),
            config = %options.config.display(),
            state = %options.state.display(),
            "control plane is up"
        );
        Ok(())
    })
}

impl Place {
    /// Makes the directories, and refuses where another control plane answers.
    pub(crate) fn options(
        &self,
        proxy_listen: Vec<SocketAddr>,
        api_listen: SocketAddr,
        advertise: Vec<String>,
    ) -> anyhow::Result<Options> {
        let dirs = self.dirs()?;
        if let Ok(stream) = std::os::unix::net::UnixStream::connect(dirs.api_socket()) {
            drop(stream);
            bail!(
                "a control plane runs already for this user ({} answers); use it ('sheer check'), stop it first, or \
                 give this one directories of its own with --sockets, --state and --config",
                dirs.api_socket().display()
            );
        }
        dirs::make(&dirs.config, 0o755).context("the directory of --config cannot be used")?;
        dirs::make_private(&dirs.state).context("the directory of --state cannot be used")?;
        // Every user of the host may talk to a control plane of root; it asks the kernel who they are.
        if nix::unistd::geteuid().is_root() {
            dirs::make(&dirs.runtime, 0o755).context("the directory of --sockets cannot be used")?;
        } else {
            dirs::make_private(&dirs.runtime).context("the directory of --sockets cannot be used")?;
        }
        Ok(Options {
            config: dirs.config,
            state: dirs.state,
            sockets: Some(dirs.runtime),
            proxy_listen,
            api_listen: Some(api_listen),
            advertise,
            ..Options::default()
        })
    }

    fn dirs(&self) -> anyhow::Result<Dirs> {
        directories(self.config.as_deref(), self.state.as_deref(), self.sockets.as_deref())
    }
}

/// The given directories, and the user's for those not given.
fn directories(config: Option<&Path>, state: Option<&Path>, sockets: Option<&Path>) -> anyhow::Result<Dirs> {
    if let (Some(config), Some(state), Some(runtime)) = (config, state, sockets) {
        return Ok(Dirs { runtime: runtime.into(), state: state.into(), config: config.into() });
    }
    let user = Dirs::of_user()?;
    Ok(Dirs {
        runtime: sockets.map_or(user.runtime, Path::to_owned),
        state: state.map_or_else(|| user.state.join("control"), Path::to_owned),
        config: config.map_or(user.config, Path::to_owned),
    })
}

/// Runs a control plane until it is told to end; `started` says to people that it is there.
pub(crate) fn serve(
    options: Options,
    started: impl FnOnce(&ControlPlane, &Options) -> anyhow::Result<()>,
) -> anyhow::Result<ExitCode> {
    // Each proxy of the mesh keeps two connections.
    crate::descriptors::take_all();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let progress = Progress::of("starting the control plane");
        let mut plane = sheer_control::start(options.clone()).await?;
        drop(progress);
        started(&plane, &options)?;
        notify("READY=1\nSTATUS=serving");
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
            error = plane.failed() => return Err(anyhow::Error::new(error).context("the control plane stopped")),
        }
        notify("STOPPING=1");
        tokio::select! {
            () = plane.stop() => {}
            // A second signal means: now.
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        tracing::info!("control plane has ended; running workloads go on with what they know");
        Ok(ExitCode::SUCCESS)
    })
}

/// Tells systemd, when it asked to be told (sd_notify(3)).
fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_bytes() {
        [b'@', name @ ..] => std::os::unix::net::SocketAddr::from_abstract_name(name),
        _ => std::os::unix::net::SocketAddr::from_pathname(&path),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = sent {
        tracing::warn!(%error, "cannot notify systemd");
    }
}

fn backup(args: &Backup) -> anyhow::Result<ExitCode> {
    let dirs = directories(args.config.as_deref(), args.state.as_deref(), None)?;
    let archive = match args.connect.client()?.get_bytes("/api/v1/backup") {
        Ok(archive) => archive.to_vec(),
        Err(error) if error.is::<Absent>() && args.connect.api.is_none() => {
            let mut archive = Vec::new();
            sheer_control::backup(&dirs.state, &dirs.config, &mut archive)?;
            archive
        }
        Err(error) => return Err(error),
    };
    write_private(&args.output, &archive)
        .with_context(|| format!("cannot write the backup to {}", args.output.display()))?;
    anstream::eprintln!("{} holds {} bytes, the root key among them", args.output.display(), archive.len());
    Ok(ExitCode::SUCCESS)
}

/// Whole or not at all, and for this user only.
fn write_private(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    let staged = PathBuf::from(name);
    let _ = std::fs::remove_file(&staged);
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&staged)?;
    file.write_all(content).and_then(|()| file.sync_all()).and_then(|()| std::fs::rename(&staged, path)).inspect_err(
        |_| {
            // The error is told; the part is of no use.
            let _ = std::fs::remove_file(&staged);
        },
    )
}

fn restore(args: &Restore) -> anyhow::Result<ExitCode> {
    let dirs = directories(args.config.as_deref(), args.state.as_deref(), None)?;
    let archive =
        std::fs::File::open(&args.input).with_context(|| format!("cannot read the backup {}", args.input.display()))?;
    let restored = sheer_control::restore(archive, &dirs.state, &dirs.config)?;
    let config = dirs.config.display();
    let files = match restored.kept_config {
        true => format!("{config} held files already, which were left as they are"),
        false => format!("{} in {config}", output::counted(restored.files, "file")),
    };
    anstream::eprintln!(
        "{} in {}, {files}; start it with 'sheer up' or 'sheer control'",
        output::counted(restored.records, "record"),
        dirs.state.display(),
    );
    Ok(ExitCode::SUCCESS)
}
