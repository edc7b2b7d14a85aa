//! Containers of busybox for the tests, and the launcher as Python calls it.

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// No verb may take longer; a test that hangs is a failed test.
const LIMIT: Duration = Duration::from_secs(30);
const BUSYBOX: &str = "/bin/busybox";
const APPLETS: &[&str] = &[
    "sh", "sleep", "true", "false", "cat", "id", "env", "ls", "mkdir", "echo", "pwd", "tty", "kill", "touch", "grep",
];

static NEXT: AtomicUsize = AtomicUsize::new(0);

/// False, with a word why, where containers cannot be tested.
pub fn possible() -> bool {
    let root = nix::unistd::geteuid().is_root();
    let busybox = Path::new(BUSYBOX).exists();
    if !root || !busybox {
        eprintln!("skipped: needs root (is {root}) and {BUSYBOX} of busybox-static (is {busybox})");
    }
    root && busybox
}

/// How the launcher ended, and what it reported.
#[derive(Debug)]
pub struct Answer {
    pub code: i32,
    pub report: Value,
}

impl Answer {
    pub fn ok(self) -> Outcome<Value> {
        match self.report["ok"].as_bool() {
            Some(true) => Ok(self.report),
            _ => Err(format!("{self:?}").into()),
        }
    }

    pub fn error(&self) -> (String, String) {
        let text = |key: &str| self.report["error"][key].as_str().unwrap_or_default().to_owned();
        (text("code"), text("message"))
    }
}

/// A directory with a bundle, deleted with its container when dropped.
pub struct Bundle {
    pub directory: PathBuf,
    pub id: String,
    pub spec: Value,
}

impl Bundle {
    pub fn new(arguments: &[&str]) -> Outcome<Self> {
        let id = format!("lt{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(format!("torpor-{id}"));
        let root = directory.join("bundle/rootfs");
        for name in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
            fs::create_dir_all(root.join(name))?;
        }
        fs::copy(BUSYBOX, root.join("bin/busybox"))?;
        for applet in APPLETS {
            symlink("busybox", root.join("bin").join(applet))?;
        }
        Ok(Self {
            directory,
            id,
            spec: spec(arguments),
        })
    }

    pub fn path(&self) -> PathBuf {
        self.directory.join("bundle")
    }

    pub fn rootfs(&self) -> PathBuf {
        self.path().join("rootfs")
    }

    pub fn oci(&self) -> PathBuf {
        self.directory.join("state/oci")
    }

    /// Everything the container has written to its stdout.
    pub fn output(&self) -> Outcome<String> {
        Ok(fs::read_to_string(self.directory.join("out"))?)
    }

    pub fn create(&self, flags: &[&str]) -> Outcome<Answer> {
        finish(self.spawn_create(flags)?)
    }

    pub fn spawn_create(&self, flags: &[&str]) -> Outcome<Child> {
        let config = self.path().join("config.json");
        fs::write(&config, self.spec.to_string())?;
        let (config, bundle) = (config.display().to_string(), self.path().display().to_string());
        let mut all = vec!["--bundle", &bundle, "--spec", &config];
        all.extend(flags);
        self.spawn("create", &all)
    }

    pub fn start(&self) -> Outcome<Answer> {
        finish(self.spawn("start", &[])?)
    }

    pub fn delete(&self) -> Outcome<Answer> {
        finish(self.spawn("delete", &[])?)
    }

    pub fn exec(&self, process: Value, flags: &[&str]) -> Outcome<Answer> {
        let file = self.directory.join("process.json");
        fs::write(&file, process.to_string())?;
        let file = file.display().to_string();
        let mut all = vec!["--process", &file];
        all.extend(flags);
        finish(self.spawn("exec", &all)?)
    }

    /// Creates, starts, waits for the program, and deletes; what it wrote.
    pub fn run(&self) -> Outcome<String> {
        let supervisor = self.spawn_create(&["--supervise"])?;
        let (supervisor, report) = first_line(supervisor)?;
        if report["ok"] != json!(true) {
            return Err(report.to_string().into());
        }
        self.start()?.ok()?;
        wait(supervisor)?;
        self.delete()?.ok()?;
        self.output()
    }

    /// The launcher, reporting on its standard output; the container's goes to the file "out".
    pub fn spawn(&self, verb: &str, flags: &[&str]) -> Outcome<Child> {
        let script = r#"exec 9>&1 >>"$OUT"; exec "$0" "$@" --report-fd 9"#;
        let child = Command::new("/bin/sh")
            .args(["-c", script, launcher().as_str(), verb, "--id", &self.id, "--root"])
            .arg(self.oci())
            .args(flags)
            .env("OUT", self.directory.join("out"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        Ok(child)
    }

    /// Whatever of the container is still on this machine.
    pub fn traces(&self) -> Outcome<Vec<String>> {
        let mut found = Vec::new();
        for mount in fs::read_to_string("/proc/mounts")?
            .lines()
            .filter(|line| line.contains(&self.id))
        {
            found.push(mount.to_owned());
        }
        for hierarchy in fs::read_dir("/sys/fs/cgroup")?.flatten() {
            for group in fs::read_dir(hierarchy.path()).into_iter().flatten().flatten() {
                if group.file_name().to_string_lossy().contains(&self.id) {
                    found.push(group.path().display().to_string());
                }
            }
        }
        for entry in fs::read_dir(self.oci()).into_iter().flatten().flatten() {
            found.push(entry.path().display().to_string());
        }
        Ok(found)
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = self.delete();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// The binary to test: another one than cargo's may be named, such as the static one that is shipped.
pub fn launcher() -> String {
    std::env::var("TORPOR_LAUNCHER").unwrap_or_else(|_| env!("CARGO_BIN_EXE_torpor-launcher").to_owned())
}

pub fn wait(mut child: Child) -> Outcome<i32> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.code().unwrap_or(-1));
        }
        if start.elapsed() > LIMIT {
            child.kill()?;
            return Err("the launcher hangs".into());
        }
        sleep(Duration::from_millis(2));
    }
}

pub fn finish(mut child: Child) -> Outcome<Answer> {
    let output = child.stdout.take();
    let code = wait(child)?;
    let mut text = String::new();
    if let Some(mut output) = output {
        output.read_to_string(&mut text)?;
    }
    let report = serde_json::from_str(&text).unwrap_or(Value::Null);
    Ok(Answer { code, report })
}

/// The report of a launcher that stays.
pub fn first_line(mut child: Child) -> Outcome<(Child, Value)> {
    let mut line = String::new();
    if let Some(output) = child.stdout.take() {
        BufReader::new(output).read_line(&mut line)?;
    }
    Ok((child, serde_json::from_str(&line)?))
}

/// Waits for something that happens in another process.
pub fn until(mut condition: impl FnMut() -> bool) -> Outcome {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > LIMIT {
            return Err("it never happened".into());
        }
        sleep(Duration::from_millis(2));
    }
    Ok(())
}

pub fn status(pid: &Value) -> Outcome<String> {
    let mut text = String::new();
    File::open(format!("/proc/{pid}/status"))?.read_to_string(&mut text)?;
    Ok(text)
}

pub fn process(arguments: &[&str]) -> Value {
    json!({
        "args": arguments,
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
        "env": ["PATH=/bin"],
        "noNewPrivileges": true,
    })
}

fn spec(arguments: &[&str]) -> Value {
    let masked = ["/proc/acpi", "/proc/keys", "/proc/timer_list", "/sys/firmware"];
    json!({
        "ociVersion": "1.0.2",
        "process": process(arguments),
        "root": {"path": "rootfs"},
        "hostname": "busy",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "ro"]},
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}],
            "maskedPaths": masked,
            "readonlyPaths": ["/proc/sys"],
        },
    })
}
