//! F6: file systems that err, beneath a proxy's state and beneath the control plane's.

use crate::site::{DOOR, Ground, caller, is_served, none_failed, sample};
use crate::stored::mark;
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use sheer_testmesh::callers::{Callers, Manner};
use sheer_testmesh::disk::{Disk, Mood};
use sheer_testmesh::faults::row;
use sheer_testmesh::mesh::{Control, PATIENCE};
use sheer_testmesh::program::run;
use sheer_testmesh::wait;

#[test]
fn disks_that_err_disturb_nobody() -> Result<()> {
    if !std::path::Path::new("/dev/fuse").exists() {
        eprintln!("left out: this machine has no /dev/fuse, so that no disk of it can err");
        return Ok(());
    }
    let done = "the file systems of a proxy's state and of the control plane's err, by FUSE: EIO, short writes, half a write and then EIO; \
                then kill -9 of the control plane";
    let bar = "0 failed; changes are in force; what cannot be stored is refused with 507 and the remedy, reads go on; all is stored \
               again without a restart, and nothing that was acknowledged is lost";
    row("F6", done, bar, err())
}

fn err() -> Result<String> {
    let ground = Ground::new()?;
    let host = &ground.near;
    let (home, center) = (ground.home("caller")?, ground.home("control")?);
    let of_proxy = Disk::mount(host, &home.join("caller-state"), 0o755, &ground.home("disk")?)?;
    let of_center = Disk::mount(&ground.center, &center.join("state"), 0o700, &ground.home("center-disk")?)?;
    let mut control = Control::start(&ground.center, &center)?;
    let _web = sample(&control, host, &ground.home("web")?, ["web", "catalog", "8080"], "web-1", &[])?;
    let asks = caller(&control, host, &home, &["web:80"])?;
    control.serves("web", 1)?;
    is_served(host, DOOR)?;
    let stored = |text: &str| -> Result<()> {
        let mut look = std::process::Command::new("grep");
        run(look.args(["-rqa", "--exclude=.*", text]).arg(&of_proxy.beneath)).map(drop).context("it is not stored")
    };
    mark(&control, host, "first")?;
    wait::until("it is stored", PATIENCE, || stored("first"))?;
    let callers = [Manner::Fresh, Manner::Kept].map(|manner| Callers::come(host, DOOR.parse()?, manner, 2));
    let callers = callers.into_iter().collect::<Result<Vec<_>>>()?;

    // The proxy's: what is in force is not what is stored, and what was stored stays whole.
    for (mood, value) in [(Mood::Errors, "second"), (Mood::Torn, "third")] {
        let erred = of_proxy.erred();
        of_proxy.becomes(mood)?;
        mark(&control, host, value)?;
        wait::until("it is tried, and told", PATIENCE, || {
            ensure!(of_proxy.erred() > erred && asks.output().contains("cannot write"), "{}", asks.output());
            Ok(())
        })?;
        stored("first").context("what was stored before is lost")?;
    }
    of_proxy.becomes(Mood::Well)?;
    wait::until("what is in force is stored, though nothing changes", PATIENCE, || stored("third"))?;
    of_proxy.becomes(Mood::Short)?;
    mark(&control, host, "fourth")?;
    wait::until("it is stored by short writes", PATIENCE, || stored("fourth"))?;
    of_proxy.becomes(Mood::Well)?;

    // The control plane's: writes are refused, everything else goes on.
    let before = address_of(&control)?;
    let create = ["token", "create", "--service-account", "web"];
    for (mood, value) in [(Mood::Errors, "fifth"), (Mood::Torn, "sixth")] {
        of_center.becomes(mood)?;
        let said = format!("{:#}", control.sheer(&create).err().context("a token is given that is not stored")?);
        ensure!(said.contains("could not be written") && said.contains("health of the disk"), "{said}");
        let code = ask_for_token(&control)?;
        ensure!(code == "507" || code == "503", "a write is answered with {code}");
        mark(&control, host, value)?;
        ensure!(address_of(&control)? == before, "reads do not go on");
        of_center.becomes(Mood::Well)?;
        wait::until("the state is written again", PATIENCE, || control.sheer(&create))?;
    }
    of_center.becomes(Mood::Short)?;
    wait::until("short writes are completed", PATIENCE, || control.sheer(&create))?;
    of_center.becomes(Mood::Well)?;
    let token = control.token("default", "web", 1)?;
    control.program.signal(Signal::SIGKILL)?;
    control.program.wait(PATIENCE)?;
    control.restart()?;
    ensure!(address_of(&control)? == before, "the address of a service is lost");
    // Who was given a token before it was killed joins with it after.
    let more = ground.home("more")?;
    let mut joins = sheer_testmesh::mesh::Workload::new(host, "web", &more)?
        .flags(&["--name", "web-2", "--capture", "none"])
        .flags(sheer_testmesh::shop::PLAIN_USER)
        .joins(&control, &token)
        .start(&["sleep", "infinity"])?;
    joins.prints("is ready", PATIENCE).context("an acknowledged token is lost")?;
    mark(&control, host, "last")?;
    let asked: Vec<_> = callers.into_iter().flat_map(Callers::leave).collect();
    none_failed(&asked)?;
    Ok(format!(
        "{} calls, 0 failed; every change in force; tokens refused with 507 while the disk erred, and given as soon as it was well; \
         what was acknowledged outlived kill -9",
        asked.len()
    ))
}

/// The address of the service, from the control plane.
fn address_of(control: &Control<'_>) -> Result<serde_json::Value> {
    Ok(control.query(&["get", "service", "web"])?["services"][0]["virtual_ips"].take())
}

/// The status of the answer to a request that needs the store.
fn ask_for_token(control: &Control<'_>) -> Result<String> {
    let body = r#"{"namespace":"default","service_account":"web"}"#;
    run(control.host.command("curl").args(["-sS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "10"]).args([
        "--unix-socket",
        "/run/sheer/api.sock",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
        "http://localhost/api/v1/tokens",
    ]))
}
