//! The real Prometheus scrapes the proxies: what it holds equals what the client counted, edge by edge.

use anyhow::{Context as _, Result, bail, ensure};
use sheer_testmesh::mesh::{Control, PATIENCE, Workload};
use sheer_testmesh::net::Net;
use sheer_testmesh::program::{Program, run, sheer};
use sheer_testmesh::wait;

const CONFIG: &str = "global: {scrape_interval: 1s}
scrape_configs:
  - job_name: sheer
    static_configs:
      - targets: ['127.0.0.1:9201', '127.0.0.1:9202']
";

/// What is asked of the server, and how often.
const ASKED: [(&str, u32); 3] = [("200", 37), ("404", 5), ("503", 3)];

#[test]
fn prometheus_counts_what_the_client_counted() -> Result<()> {
    let net = Net::new()?;
    let home = net.directory();
    let host = net.host("host")?;
    let control = Control::start(&host, &home.join("control"))?;
    let binary = sheer()?;
    let binary = binary.to_string_lossy();
    let _web = Workload::new(&host, "web", home)?
        .flags(&["--port", "8080", "--user", "root", "--metrics", "127.0.0.1:9201"])
        .start(&[&binary, "__demo-service", "catalog", "--port", "8080"])?;
    let _client = Workload::new(&host, "client", home)?
        .flags(&["--user", "root", "--metrics", "127.0.0.1:9202"])
        .start(&["sleep", "infinity"])?;
    let ask = |path: &str, times: u32| {
        let many = format!("for i in $(seq {times}); do curl -sS -o /dev/null -w '%{{http_code}}\\n' {path}; done");
        run(host.command(&*binary).args(["exec", "client-1", "--", "sh", "-c", &many]))
    };
    wait::until("the service takes traffic", PATIENCE, || {
        let found = control.query(&["get", "service", "web"])?;
        ensure!(found["services"][0]["healthy"] == 1, "{found}");
        Ok(())
    })?;
    wait::until("the client runs", PATIENCE, || run(host.command(&*binary).args(["exec", "client-1", "--", "true"])))?;
    for (status, times) in ASKED {
        let answers = ask(&format!("http://web/probe/status/{status}"), times)?;
        assert_eq!(answers, format!("{status}\n").repeat(times as usize));
    }

    std::fs::write(home.join("prometheus.yml"), CONFIG)?;
    let mut command = host.command("prometheus");
    command.args(["--web.listen-address=127.0.0.1:9090", "--log.level=warn"]);
    command.arg(format!("--config.file={}", home.join("prometheus.yml").display()));
    command.arg(format!("--storage.tsdb.path={}", home.join("tsdb").display()));
    let _prometheus = Program::start("prometheus", home, &mut command)?;
    let value = |query: &str| -> Result<f64> {
        let mut curl = host.command("curl");
        curl.args(["-sS", "-G", "http://127.0.0.1:9090/api/v1/query", "--data-urlencode", &format!("query={query}")]);
        let answer: serde_json::Value = serde_json::from_str(&run(&mut curl)?)?;
        let text = answer["data"]["result"][0]["value"][1].as_str().map(str::to_owned);
        Ok(text.with_context(|| format!("{query}: {answer}"))?.parse()?)
    };
    let becomes = |query: &str, wanted: f64| {
        wait::until(query, PATIENCE, || match value(query)? {
            seen if seen == wanted => Ok(()),
            seen => bail!("{seen} instead of {wanted}"),
        })
    };
    becomes("sum(up)", 2.0)?;
    let total: u32 = ASKED.iter().map(|(_, times)| times).sum();
    for side in ["outbound", "inbound"] {
        let edge = format!(r#"side="{side}",source="default/client",destination="default/web",mtls="true""#);
        for (status, times) in ASKED {
            becomes(&format!(r#"sum(sheer_requests_total{{{edge},status="{status}"}})"#), f64::from(times))?;
        }
        for histogram in ["sheer_request_duration_seconds", "sheer_mesh_added_seconds"] {
            becomes(&format!("sum({histogram}_count{{{edge}}})"), f64::from(total))?;
            becomes(&format!(r#"sum({histogram}_bucket{{{edge},le="+Inf"}})"#), f64::from(total))?;
        }
        becomes(&format!("sum(sheer_requests_total{{{edge}}})"), f64::from(total))?;
    }
    for port in ["9201", "9202"] {
        // The linter of Prometheus' own tool, which also parses strictly.
        let lint = format!("curl -sS http://127.0.0.1:{port}/metrics | promtool check metrics 2>&1");
        let complaints = run(host.command("sh").args(["-c", &lint]))?;
        ensure!(complaints.is_empty(), "promtool complains:\n{complaints}");
    }
    Ok(())
}
