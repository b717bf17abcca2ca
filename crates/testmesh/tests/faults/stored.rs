//! F5: the control plane's store is damaged. F6: a proxy's disk is full, or refuses.

use crate::site::{DOOR, Ground, caller, is_served, none_failed, sample};
use anyhow::{Context, Result, bail, ensure};
use sheer_control::store::{Store, StoreError, Table};
use sheer_testmesh::callers::{Callers, Manner};
use sheer_testmesh::faults::{row, times};
use sheer_testmesh::mesh::PATIENCE;
use sheer_testmesh::net::Host;
use sheer_testmesh::program::{run, sheer};
use sheer_testmesh::wait;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

#[test]
fn a_damaged_store_is_never_taken_for_a_good_one() -> Result<()> {
    let count = times(60, 600);
    let done =
        format!("{count} damages of the control plane's store: cut off, a bit flipped, a page of zeros, removed");
    let bar = "refused with a clear error, or opened with everything that was acknowledged";
    row("F5", &done, bar, damage(count))
}

fn damage(count: usize) -> Result<String> {
    let directory = tempfile::tempdir()?;
    let home = directory.path().join("state");
    let store = Store::open(&home)?;
    for number in 0..150_u64 {
        let key = format!("default/service-{number}");
        let put = move |transaction: &sheer_control::store::Transaction<'_>| {
            transaction.put(Table::Pins, &key, &vec!["account"; 20])
        };
        store.write_now::<_, StoreError>(put)?;
    }
    let whole = store.image()?;
    drop(store);
    let file = home.join("sheer.redb");
    // The writer's thread lets go of the file a moment after the store is dropped.
    wait::until("the store is closed", PATIENCE, || Store::open(&home).map(drop).map_err(Into::into))?;
    let good = wait::until("the store is readable", PATIENCE, || Ok(std::fs::read(&file)?))?;
    let (mut refused, mut sound) = (0, 0);
    for number in 0..count {
        // Spread over the whole file, and the same at each run.
        let at = number.wrapping_mul(2_654_435_761) % good.len();
        let mut bytes = good.clone();
        let what = match number % 3 {
            0 => {
                bytes.truncate(at);
                "cut off"
            }
            1 => {
                bytes[at] ^= 1 << (number % 8);
                "a bit flipped"
            }
            _ => {
                let page = at / 4096 * 4096;
                let end = (page + 4096).min(bytes.len());
                bytes[page..end].fill(0);
                "a page of zeros"
            }
        };
        let broken = directory.path().join(format!("broken-{number}"));
        std::fs::create_dir(&broken)?;
        std::fs::write(broken.join("sheer.redb"), &bytes)?;
        match Store::open(&broken) {
            Err(StoreError::Damaged { .. }) => refused += 1,
            Err(error) => bail!("{what} at {at}: {error}"),
            // Nothing was left of it: that is a new store, as where there is none.
            Ok(_) if bytes.is_empty() => refused += 1,
            Ok(store) => {
                ensure!(store.image()? == whole, "{what} at {at} of {}: something else was read", good.len());
                sound += 1;
            }
        }
        let _ = std::fs::remove_dir_all(&broken);
    }
    // As people meet it.
    let mut bytes = good.clone();
    bytes.iter_mut().skip(4096).step_by(64).for_each(|byte| *byte ^= 0x55);
    std::fs::write(&file, bytes)?;
    let config = directory.path().join("mesh.d");
    std::fs::create_dir(&config)?;
    let mut control = Command::new(sheer()?);
    control
        .arg("control")
        .arg("--config")
        .arg(&config)
        .arg("--state")
        .arg(&home)
        .arg("--sockets")
        .arg(directory.path());
    let said = match run(control.args(["--api-listen", "127.0.0.1:0", "--proxy-listen", "127.0.0.1:0"])) {
        Ok(said) => bail!("it started: {said}"),
        Err(error) => format!("{error:#}"),
    };
    ensure!(said.contains("sheer.redb") && said.contains("restore"), "no remedy: {said}");
    Ok(format!(
        "{count} damages: {refused} refused, {sound} harmless, none read wrongly; the message names the file and the remedy"
    ))
}

#[test]
fn a_proxy_without_a_disk_goes_on() -> Result<()> {
    let done =
        "the file system of a proxy's state filled to the last byte, then made read-only, with changes meanwhile";
    let bar = "0 failed; changes are in force; what is in force is stored again without a restart";
    row("F6", done, bar, fill())
}

fn fill() -> Result<String> {
    let ground = Ground::new()?;
    let (host, control) = (&ground.near, ground.control()?);
    let home = ground.home("caller")?;
    let state = home.join("caller-state");
    std::fs::create_dir_all(&state)?;
    let path = state.to_string_lossy().into_owned();
    run(host.command("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs", &path]))?;
    let _web = sample(&control, host, &ground.home("web")?, ["web", "catalog", "8080"], "web-1", &[])?;
    let asks = caller(&control, host, &home, &["web:80"])?;
    control.serves("web", 1)?;
    is_served(host, DOOR)?;
    let stored = |text: &str| -> Result<()> {
        run(host.command("grep").args(["-rqa", text, &path])).map(drop).with_context(|| format!("{text} is not stored"))
    };
    mark(&control, host, "first")?;
    wait::until("it is stored", PATIENCE, || stored("first"))?;
    let callers = [Manner::Fresh, Manner::Kept].map(|manner| Callers::come(host, DOOR.parse()?, manner, 2));
    let callers = callers.into_iter().collect::<Result<Vec<_>>>()?;

    let fill = format!("{path}/fill");
    ensure!(run(host.command("dd").args(["if=/dev/zero", &format!("of={fill}"), "bs=1k"])).is_err(), "it is not full");
    mark(&control, host, "second")?;
    wait::until("it is told", PATIENCE, || {
        ensure!(asks.output().contains("make room"), "{}", asks.output());
        Ok(())
    })?;
    ensure!(stored("second").is_err(), "it was stored on a full disk");
    stored("first").context("what was stored before is lost")?;
    run(host.command("rm").arg(&fill))?;
    mark(&control, host, "third")?;
    wait::until("it is stored again", PATIENCE, || stored("third"))?;

    run(host.command("mount").args(["-o", "remount,ro", &path]))?;
    mark(&control, host, "fourth")?;
    run(host.command("mount").args(["-o", "remount,rw", &path]))?;
    mark(&control, host, "fifth")?;
    wait::until("it is stored once more", PATIENCE, || stored("fifth"))?;
    let asked: Vec<_> = callers.into_iter().flat_map(Callers::leave).collect();
    none_failed(&asked)?;
    Ok(format!("{} calls, 0 failed; every change in force, stored as soon as there was room", asked.len()))
}

/// Changes the configuration, and waits until answers show it.
pub(crate) fn mark(control: &sheer_testmesh::mesh::Control<'_>, host: &Host, value: &str) -> Result<()> {
    control.write("marked.yaml", &marked_with(value))?;
    wait::until(&format!("{value} is in force"), PATIENCE, || shows(host, value))
}

/// Whether answers show it.
pub(crate) fn shows(host: &Host, value: &str) -> Result<()> {
    let url = format!("http://{DOOR}/probe/healthy");
    let answer = run(host.command("curl").args(["-sS", "-i", "--max-time", "5", &url]))?;
    ensure!(answer.contains(&format!("x-marked: {value}\r")), "{answer}");
    Ok(())
}

/// A route that marks each answer.
pub(crate) fn marked_with(value: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: marked}}\nspec:\n  parentRefs: \
         [{{group: '', kind: Service, name: web}}]\n  rules:\n  - filters:\n    - {{type: ResponseHeaderModifier, \
         responseHeaderModifier: {{set: [{{name: x-marked, value: {value}}}]}}}}\n    backendRefs: [{{name: web, port: 80}}]\n"
    )
}

/// The seconds of a processor that a process has used.
pub(crate) fn processor_time(pid: nix::unistd::Pid) -> Result<Duration> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"))?;
    let after = stat.rsplit_once(") ").context("no name")?.1;
    let field = |index: usize| -> Result<u64> { Ok(after.split(' ').nth(index).context("too short")?.parse()?) };
    // User and system time, in hundredths of a second.
    Ok(Duration::from_millis((field(11)? + field(12)?) * 10))
}
