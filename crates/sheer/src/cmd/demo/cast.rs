//! Who takes part: the services of the sample shop, its load, and what to tell people.

use super::stage::Stage;
use owo_colors::OwoColorize as _;
use std::ffi::OsString;
use std::path::Path;

/// One workload.
pub(super) struct Member {
    /// Its name.
    pub(super) name: &'static str,
    /// The service that it answers for.
    service: &'static str,
    /// What it does, in a few words.
    pub(super) what: &'static str,
    /// Flags of `sheer run`.
    flags: Vec<String>,
    command: Command,
}

enum Command {
    /// A sample service in this binary, with its arguments.
    Sample(Vec<String>),
    /// A program of the system.
    Program(Vec<String>),
}

/// Programs of the system that take part, and the Debian packages that hold them.
pub(super) const PROGRAMS: &[(&str, &str)] = &[("redis-server", "redis-server"), ("nft", "nftables")];

/// What is applied before the services start.
pub(super) const OBJECTS: &[(&str, &str)] = &[
    ("services.yaml", include_str!("../../../../../demo/canary/services.yaml")),
    ("100-0.yaml", include_str!("../../../../../demo/canary/100-0.yaml")),
];

/// The steps of the canary, for people to apply.
pub(super) const STEPS: &[(&str, &str)] = &[
    ("100-0.yaml", include_str!("../../../../../demo/canary/100-0.yaml")),
    ("90-10.yaml", include_str!("../../../../../demo/canary/90-10.yaml")),
    ("50-50.yaml", include_str!("../../../../../demo/canary/50-50.yaml")),
    ("0-100.yaml", include_str!("../../../../../demo/canary/0-100.yaml")),
];

/// The services; `web` is published at this port of localhost.
pub(super) fn services(shop: u16) -> Vec<Member> {
    let sample = |kind: &str, port: u16, version: &str| {
        Command::Sample(words(&format!("{kind} --port {port} --version {version}")))
    };
    vec![
        Member {
            name: "redis",
            service: "redis",
            what: "a real Redis",
            flags: words("--port 6379/tcp"),
            // Callers come authenticated from the mesh and not from 127.0.0.1, which alone its protected mode admits.
            command: Command::Program(words(
                "redis-server --port 6379 --protected-mode no --save --appendonly no --dir /",
            )),
        },
        Member {
            name: "cart",
            service: "cart",
            what: "HTTP; keeps carts in redis",
            flags: words("--port 8080/http"),
            command: sample("cart", 8080, "v1"),
        },
        Member {
            name: "catalog-1",
            service: "catalog",
            what: "HTTP; one of two",
            flags: words("--port 8080/http"),
            command: sample("catalog", 8080, "v1"),
        },
        Member {
            name: "catalog-2",
            service: "catalog",
            what: "HTTP; two of two",
            flags: words("--port 8080/http"),
            command: sample("catalog", 8080, "v1"),
        },
        Member {
            name: "pricing",
            service: "pricing",
            what: "gRPC",
            flags: words("--port 9000/grpc"),
            command: sample("pricing", 9000, "v1"),
        },
        Member {
            name: "reviews-v1",
            service: "reviews",
            what: "HTTP; reviews in words",
            flags: words("--port 8080/http --label version=v1"),
            command: sample("reviews", 8080, "v1"),
        },
        Member {
            name: "reviews-v2",
            service: "reviews",
            what: "HTTP; reviews with stars; no traffic yet",
            flags: words("--port 8080/http --label version=v2"),
            command: sample("reviews", 8080, "v2"),
        },
        Member {
            name: "echo",
            service: "echo",
            what: "TCP",
            flags: words("--port 7000/tcp"),
            command: sample("echo", 7000, "v1"),
        },
        Member {
            name: "web",
            service: "web",
            what: "HTTP; the shop's front, calls the others",
            flags: words(&format!("--port 8080/http --publish {shop}=8080")),
            command: Command::Sample(words("web --port 8080 --peer pricing=http://pricing:9000")),
        },
    ]
}

/// The customers.
pub(super) fn load() -> Member {
    let targets = [
        "http1@20x4=http://web/api/items/net",
        "http1@2x1=http://web/",
        "http1@5x1=http://web/api/cart/ada",
        "http2@10x1=http://catalog/items",
        "grpc@10x1=http://pricing:9000/",
        "grpc-stream@1x1=http://pricing:9000/",
        "tcp@10x2=tcp://echo:7000",
    ];
    let mut arguments = words("load --live-json");
    arguments.extend(targets.iter().flat_map(|target| ["--target".to_owned(), (*target).to_owned()]));
    Member {
        name: "load",
        service: "load",
        what: "customers: HTTP/1.1, HTTP/2, gRPC, TCP",
        flags: Vec::new(),
        command: Command::Sample(arguments),
    }
}

fn words(text: &str) -> Vec<String> {
    // `--save` of redis-server takes an empty value, which no blank-separated text can hold.
    text.split(' ')
        .flat_map(|word| match word {
            "--save" => vec!["--save".to_owned(), String::new()],
            word => vec![word.to_owned()],
        })
        .collect()
}

impl Member {
    /// The arguments of `sheer` that start it.
    pub(super) fn command_line(&self, stage: &Stage) -> Vec<OsString> {
        let mut line: Vec<OsString> = vec!["run".into(), self.service.into(), "--name".into(), self.name.into()];
        line.extend(["--state".into(), stage.state_of(self.name).into_os_string()]);
        line.extend(["--drain-grace".into(), "15".into()]);
        line.extend(self.flags.iter().map(OsString::from));
        line.push("--".into());
        match &self.command {
            Command::Sample(arguments) => {
                line.push(stage.binary().into());
                line.push("__demo-service".into());
                line.extend(arguments.iter().map(OsString::from));
            }
            Command::Program(words) => line.extend(words.iter().map(OsString::from)),
        }
        line
    }
}

/// What to look at and what to type; `sheer` is how this program is typed here.
pub(super) fn what_next(sheer: &str, shop: u16, page: &str, canary: &Path) -> String {
    let canary = canary.display();
    let lines = [
        (format!("{sheer} edges"), "who calls whom, how well, encrypted"),
        (format!("{sheer} stat"), "each service"),
        (format!("{sheer} apply -f {canary}/90-10.yaml"), "a tenth of the reviews from v2; then 50-50, 0-100"),
        (format!("curl -s localhost:{shop}/api/items/net"), "which version answered?"),
        ("pkill -f 'demo-service cart'".to_owned(), "kill a service ..."),
        (format!("curl -i localhost:{shop}/api/cart/ada"), "... and read why"),
        (format!("{sheer} check"), "what is wrong, why, how to mend it"),
        (format!("{sheer} run hello --port 9999 -- python3 -m http.server 9999"), "your own process; then:"),
        (format!("{sheer} exec web -- curl -s http://hello/"), "as web sees it"),
    ];
    let width = lines.iter().map(|(command, _)| command.len()).max().unwrap_or(0);
    let mut text = format!("\nThe shop   http://localhost:{shop}/\nThe mesh   {page}\n");
    text += "           (opens once, within a minute; then 'sheer dashboard' prints another link)\n"
        .replace("sheer", sheer)
        .as_str();
    text += "\nIn another terminal:\n";
    for (command, remark) in &lines {
        text += &format!("  {}{:space$}  {}\n", command.bold(), "", remark.dimmed(), space = width - command.len());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart_and_versions_are_labelled() {
        let services = services(8080);
        let mut names: Vec<_> = services.iter().map(|member| member.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), services.len());
        let reviews = services.iter().filter(|member| member.service == "reviews");
        assert!(reviews.clone().all(|member| member.flags.iter().any(|flag| flag.starts_with("version="))));
        assert_eq!(reviews.count(), 2);
    }

    #[test]
    fn what_to_type_lines_up_and_names_the_program() {
        let text = what_next("target/quick/sheer", 8081, "http://127.0.0.1:1/", Path::new("/tmp/d/canary"));
        let text = anstream::adapter::strip_str(&text).to_string();
        assert!(text.contains("  target/quick/sheer apply -f /tmp/d/canary/90-10.yaml"), "{text}");
        assert!(text.contains("localhost:8081/api/items/net") && !text.contains(" sheer "), "{text}");
        let column = |remark: &str| text.lines().find_map(|line| line.find(remark)).expect("the remark");
        assert_eq!(column("each service"), column("your own process"));
    }

    #[test]
    fn an_empty_value_can_be_said() {
        assert_eq!(words("a --save b"), ["a", "--save", "", "b"]);
    }
}
