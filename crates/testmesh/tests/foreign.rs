//! An application written by others runs meshed: WordPress on php-fpm behind nginx, with MariaDB, all from system packages.
//!
//! The same files are used twice: once with the four names in `/etc/hosts` and no mesh, once with each program under
//! `sheer run`. Nothing in the configuration is changed between the two, and a client that installs the site, writes,
//! reads and searches must see the same answers.

use anyhow::{Context, Result, ensure};
use sheer_testmesh::mesh::{Control, PATIENCE, Workload};
use sheer_testmesh::net::{Host, Net};
use sheer_testmesh::program::{Program, run};
use sheer_testmesh::wait;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The application's own files, which neither run changes.
struct Site {
    home: PathBuf,
}

const SITE: &str = "http://blog.test";

#[test]
fn wordpress_gives_the_same_answers_meshed() -> Result<()> {
    let net = Net::new()?;
    let direct = {
        let (host, site) = (net.host("direct")?, Site::prepare(&net.directory().join("direct"))?);
        let hosts = site.home.join("hosts");
        std::fs::write(&hosts, "127.0.0.1 localhost php db\n")?;
        run(host.command("mount").arg("--bind").arg(&hosts).arg("/etc/hosts"))?;
        let _programs = [
            Program::start("db", &site.home, &mut site.on(&host, &site.mariadb()))?,
            Program::start("php", &site.home, &mut site.on(&host, &site.php()))?,
            Program::start("web", &site.home, &mut site.on(&host, &site.nginx()))?,
        ];
        Visit { host: &host, port: 80 }.everything().context("direct")?
    };
    let (host, site) = (net.host("meshed")?, Site::prepare(&net.directory().join("meshed"))?);
    let before = site.fingerprint()?;
    let control = Control::start(&host, &net.directory().join("control"))?;
    let start = |service: &str, port: &str, more: &[&str], command: &[String]| {
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        Workload::new(&host, service, &site.home)?
            .flags(&["--port", port, "--user", "root"])
            .flags(more)
            .start(&command)
    };
    let mut programs = vec![start("db", "3306", &[], &site.mariadb())?, start("php", "9000/tcp", &[], &site.php())?];
    // nginx looks its peers' names up once, when it starts, and ends when one is unknown.
    for service in ["db", "php"] {
        wait::until("nginx's peers take traffic", PATIENCE, || {
            let found = control.query(&["get", "service", service])?;
            ensure!(found["services"][0]["healthy"] == 1, "{found}");
            Ok(())
        })?;
    }
    programs.push(start("web", "80", &["--publish", "8000=80"], &site.nginx())?);
    let meshed = Visit { host: &host, port: 8000 }.everything().map_err(|error| {
        let printed: Vec<_> = programs.iter().map(Program::output).collect();
        error.context(printed.join("\n---\n")).context("meshed")
    })?;
    assert_eq!(meshed, direct);
    assert_eq!(site.fingerprint()?, before, "a file of the configuration was changed");
    let edges = control.sheer(&["edges"])?;
    for edge in ["web", "php", "db"] {
        ensure!(edges.contains(edge), "no {edge} in the edges:\n{edges}");
    }
    Ok(())
}

impl Site {
    fn prepare(home: &Path) -> Result<Self> {
        std::fs::create_dir_all(home.join("data"))?;
        std::fs::set_permissions(home, std::fs::Permissions::from_mode(0o755))?;
        run(Command::new("cp").args(["-rL", "/usr/share/wordpress"]).arg(home.join("www")))?;
        let site = Self { home: home.to_owned() };
        site.write("www/wp-config.php", &format!("<?php\n{WP_CONFIG}"))?;
        site.write("php.conf", &PHP_CONFIG.replace("HOME", &home.to_string_lossy()))?;
        site.write("nginx.conf", &NGINX_CONFIG.replace("HOME", &home.to_string_lossy()))?;
        site.write("init.sql", INIT_SQL)?;
        let data = format!("--datadir={}", home.join("data").display());
        run(Command::new("mariadb-install-db").args(["--no-defaults", "--user=root", "--skip-test-db", &data]))?;
        let bootstrap =
            format!("mariadbd --no-defaults --user=root {data} --bootstrap < {}", home.join("init.sql").display());
        run(Command::new("sh").args(["-c", &bootstrap]))?;
        Ok(site)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        Ok(std::fs::write(self.home.join(name), text)?)
    }

    /// The configuration's files with their hashes.
    fn fingerprint(&self) -> Result<String> {
        let files = ["www/wp-config.php", "php.conf", "nginx.conf"].map(|name| self.home.join(name));
        run(Command::new("sha256sum").args(files))
    }

    fn mariadb(&self) -> Vec<String> {
        let home = self.home.display();
        let socket = format!("--socket={home}/db.sock");
        let data = format!("--datadir={home}/data");
        ["mariadbd", "--no-defaults", "--user=root", &data, &socket, "--port=3306", "--bind-address=*"]
            .map(str::to_owned)
            .into()
    }

    fn php(&self) -> Vec<String> {
        ["php-fpm8.2", "-F", "-R", "-y", &self.home.join("php.conf").to_string_lossy()].map(str::to_owned).into()
    }

    fn nginx(&self) -> Vec<String> {
        let (home, config) = (self.home.to_string_lossy(), self.home.join("nginx.conf"));
        ["nginx", "-p", &home, "-c", &config.to_string_lossy()].map(str::to_owned).into()
    }

    fn on(&self, host: &Host, command: &[String]) -> Command {
        let mut on_host = host.command(&command[0]);
        on_host.args(&command[1..]);
        on_host
    }
}

/// A person with a browser, played by curl.
struct Visit<'a> {
    host: &'a Host,
    port: u16,
}

impl Visit<'_> {
    /// Installs the site, writes to it and reads it; returns what a reader can tell apart.
    fn everything(&self) -> Result<Vec<String>> {
        let install = "weblog_title=Meshed&user_name=admin&admin_password=correct-horse&admin_password2=correct-horse\
                       &pw_weak=1&admin_email=a%40blog.test&blog_public=0&language=";
        wait::until("the installer answers", PATIENCE * 2, || self.get("/wp-admin/install.php"))?;
        let installed = self.post("/wp-admin/install.php?step=2", install)?;
        ensure!(installed.contains("Success!"), "not installed: {installed}");
        let mut seen = Vec::new();
        for (title, words) in [("First", "quick brown fox".to_owned()), ("Second", "lorem ".repeat(50_000))] {
            let call = format!(
                "<?xml version=\"1.0\"?><methodCall><methodName>wp.newPost</methodName><params><param><int>1</int></param>\
                 <param><string>admin</string></param><param><string>correct-horse</string></param><param><struct>\
                 <member><name>post_title</name><value>{title}</value></member>\
                 <member><name>post_content</name><value>{words}</value></member>\
                 <member><name>post_status</name><value>publish</value></member></struct></param></params></methodCall>"
            );
            seen.push(self.post("/xmlrpc.php", &call)?);
        }
        seen.push(
            self.post(
                "/wp-comments-post.php",
                "author=Reader&email=r%40blog.test&comment=Well+said&comment_post_ID=4",
            )?,
        );
        for path in ["/?rest_route=/wp/v2/posts", "/?rest_route=/wp/v2/users", "/?rest_route=/wp/v2/posts&search=fox"] {
            let posts: serde_json::Value = serde_json::from_str(&self.get(path)?).with_context(|| path.to_owned())?;
            seen.push(without_times(posts).to_string());
        }
        for path in ["/", "/?p=4", "/wp-includes/js/jquery/jquery.js", "/no-such-page", "/wp-admin/"] {
            seen.push(format!(
                "{path} {}",
                self.curl(&["-o", "/dev/null", "-w", "%{http_code} %{redirect_url}", &url(path)])?
            ));
        }
        seen.push(self.get("/wp-includes/js/jquery/jquery.js")?);
        Ok(seen)
    }

    fn get(&self, path: &str) -> Result<String> {
        self.curl(&["--fail", &url(path)])
    }

    fn post(&self, path: &str, body: &str) -> Result<String> {
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), body)?;
        self.curl(&["--data-binary", &format!("@{}", file.path().display()), &url(path)])
    }

    fn curl(&self, arguments: &[&str]) -> Result<String> {
        let target = format!("blog.test:80:127.0.0.1:{}", self.port);
        run(self.host.command("curl").args(["-sS", "--max-time", "60", "--connect-to", &target]).args(arguments))
    }
}

fn url(path: &str) -> String {
    format!("{SITE}{path}")
}

/// What differs between two installations of the same site: when things were written.
fn without_times(value: serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    match value {
        Value::Array(items) => items.into_iter().map(without_times).collect(),
        Value::Object(fields) => {
            let kept =
                fields.into_iter().filter(|(name, _)| !name.starts_with("date") && !name.starts_with("modified"));
            Value::Object(kept.map(|(name, value)| (name, without_times(value))).collect())
        }
        other => other,
    }
}

const WP_CONFIG: &str = "define('DB_NAME', 'wordpress'); define('DB_USER', 'wp'); define('DB_PASSWORD', 'secret');
define('DB_HOST', 'db:3306'); define('DB_CHARSET', 'utf8mb4'); define('DB_COLLATE', '');
define('AUTH_KEY', 'a'); define('SECURE_AUTH_KEY', 'b'); define('LOGGED_IN_KEY', 'c'); define('NONCE_KEY', 'd');
define('AUTH_SALT', 'e'); define('SECURE_AUTH_SALT', 'f'); define('LOGGED_IN_SALT', 'g'); define('NONCE_SALT', 'h');
define('DISABLE_WP_CRON', true); define('WP_HTTP_BLOCK_EXTERNAL', true);
$table_prefix = 'wp_';
if (!defined('ABSPATH')) { define('ABSPATH', __DIR__ . '/'); }
require_once ABSPATH . 'wp-settings.php';
";

const PHP_CONFIG: &str = "[global]
error_log = HOME/php.log
daemonize = no
[www]
user = root
group = root
listen = 0.0.0.0:9000
pm = static
pm.max_children = 3
php_admin_value[sendmail_path] = /bin/true
";

const NGINX_CONFIG: &str = "user root;
daemon off;
pid HOME/nginx.pid;
error_log HOME/nginx.log;
events {}
http {
  include /etc/nginx/mime.types;
  access_log off;
  client_max_body_size 16m;
  client_body_temp_path HOME/nginx-body;
  proxy_temp_path HOME/nginx-proxy;
  fastcgi_temp_path HOME/nginx-fastcgi;
  uwsgi_temp_path HOME/nginx-uwsgi;
  scgi_temp_path HOME/nginx-scgi;
  server {
    listen 80;
    root HOME/www;
    index index.php;
    location / { try_files $uri $uri/ /index.php?$args; }
    location ~ \\.php$ {
      include /etc/nginx/fastcgi_params;
      fastcgi_param SCRIPT_FILENAME $document_root$fastcgi_script_name;
      fastcgi_pass php:9000;
    }
  }
}
";

const INIT_SQL: &str = "CREATE DATABASE wordpress;
FLUSH PRIVILEGES;
CREATE USER 'wp'@'%' IDENTIFIED BY 'secret';
GRANT ALL ON wordpress.* TO 'wp'@'%';
";
