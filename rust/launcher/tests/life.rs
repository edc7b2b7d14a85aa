//! The life of a container from `create` to `delete`.

mod support;

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use serde_json::json;
use support::{Bundle, Outcome, finish, first_line, launcher, possible, status, until, wait};

#[test]
fn a_program_runs_and_leaves_no_trace() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let bundle = Bundle::new(&["sh", "-c", "echo hello from $(cat /proc/sys/kernel/hostname)"])?;
    assert_eq!(bundle.run()?, "hello from busy\n");
    assert_eq!(bundle.traces()?, Vec::<String>::new());
    Ok(())
}

#[test]
fn a_created_init_can_be_filled_by_a_restore() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let mut bundle = Bundle::new(&["id"])?;
    bundle.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    bundle.spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"},
    ]});
    let pid = bundle.create(&[])?.ok()?["pid"].clone();
    let status = status(&pid)?;
    let own = fs::read_to_string("/proc/self/status")?;
    let line = |text: &str, key: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
        found.trim().to_owned()
    };
    assert_eq!(line(&status, "Threads:"), "1");
    assert_eq!(line(&status, "Seccomp:"), "0");
    assert_eq!(line(&status, "NoNewPrivs:"), "0");
    assert_eq!(line(&status, "Uid:"), "0\t0\t0\t0");
    assert_eq!(line(&status, "CapPrm:"), line(&own, "CapBnd:"));
    assert_eq!(line(&status, "CapBnd:"), line(&own, "CapBnd:"));
    assert_eq!(line(&status, "NSpid:"), format!("{pid}\t1"));
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let outside: Vec<&str> = cgroup
        .lines()
        .filter(|line| !line.contains(&bundle.id) && !line.starts_with("0::"))
        .collect();
    assert_eq!(outside, Vec::<&str>::new());
    // A restore has filled it: to `delete` it is running, whatever libcontainer waits for.
    finish(bundle.spawn("started", &[])?)?.ok()?;
    assert_eq!(bundle.start()?.error().0, "bad-state");
    bundle.delete()?.ok()?;
    assert_eq!(bundle.traces()?, Vec::<String>::new());
    Ok(())
}

#[test]
fn a_supervisor_ends_as_the_program_does() -> Outcome {
    if !possible() {
        return Ok(());
    }
    for (command, code) in [
        ("exit 7", 7),
        ("kill -9 $$; sleep 1; exit 1", 1),
        ("sleep 100 & exit 3", 3),
    ] {
        let bundle = Bundle::new(&["sh", "-c", command])?;
        let (supervisor, report) = first_line(bundle.spawn_create(&["--supervise"])?)?;
        assert_eq!(report["ok"], json!(true), "{report}");
        bundle.start()?.ok()?;
        assert_eq!(wait(supervisor)?, code, "{command}");
    }
    let bundle = Bundle::new(&["sleep", "100"])?;
    let (supervisor, _) = first_line(bundle.spawn_create(&["--supervise"])?)?;
    bundle.start()?.ok()?;
    bundle.delete()?.ok()?;
    assert_eq!(wait(supervisor)?, 128 + libc::SIGKILL);
    Ok(())
}

#[test]
fn a_second_container_of_the_same_name_is_refused() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let bundle = Bundle::new(&["sleep", "100"])?;
    bundle.create(&[])?.ok()?;
    let again = bundle.create(&[])?;
    assert_eq!((again.error().0.as_str(), again.code), ("exists", 1));
    bundle.start()?.ok()?;
    assert_eq!(
        bundle.start()?.error(),
        ("bad-state".to_owned(), "container is already running".to_owned())
    );
    bundle.delete()?.ok()?;
    bundle.delete()?.ok()?;
    assert_eq!(bundle.start()?.error().0, "not-found");
    Ok(())
}

#[test]
fn a_frozen_container_can_be_deleted() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let bundle = Bundle::new(&["sh", "-c", "while :; do sleep 0.01; done"])?;
    let pid = bundle.create(&[])?.ok()?["pid"].clone();
    bundle.start()?.ok()?;
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let Some(path) = cgroup
        .lines()
        .find_map(|line| line.split_once(":freezer:"))
        .map(|(_, path)| path)
    else {
        eprintln!("skipped: no cgroup v1 freezer here");
        return Ok(());
    };
    // With a frozen cgroup inside the frozen one, and another that is empty.
    let state = format!("/sys/fs/cgroup/freezer{path}/freezer.state");
    fs::create_dir(format!("/sys/fs/cgroup/freezer{path}/inner"))?;
    fs::create_dir(format!("/sys/fs/cgroup/memory{path}/inner"))?;
    fs::write(&state, "FROZEN")?;
    assert_eq!(
        bundle.exec(support::process(&["id"]), &[])?.error().1,
        "container is paused"
    );
    bundle.delete()?.ok()?;
    assert_eq!(bundle.traces()?, Vec::<String>::new());
    Ok(())
}

#[test]
fn a_report_that_nobody_reads_takes_the_container_back() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let bundle = Bundle::new(&["sleep", "100"])?;
    let mut create = bundle.spawn_create(&[])?;
    drop(create.stdout.take());
    assert_eq!(wait(create)?, 1);
    assert_eq!(bundle.traces()?, Vec::<String>::new());
    Ok(())
}

#[test]
fn a_killed_launcher_can_be_cleaned_up_after() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let mut bundle = Bundle::new(&["sleep", "100"])?;
    bundle.spec["hooks"] = json!({"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", "sleep 0.002"]}]});
    for round in 0..60 {
        let mut create = bundle.spawn_create(&[])?;
        sleep(Duration::from_micros(500 * round));
        create.kill()?;
        create.wait()?;
        bundle.delete()?.ok()?;
        assert_eq!(bundle.traces()?, Vec::<String>::new(), "round {round}");
    }
    // Nor does a process of it run on somewhere; the dead ones wait to be reaped.
    until(|| !runs(&bundle.rootfs().display().to_string()))
}

/// Whether a process has its root there, or a launcher was told to put it there.
fn runs(root: &str) -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.into_iter().any(|entry| {
        let of_root = fs::read_link(entry.path().join("root")).is_ok_and(|path| path.ends_with(root));
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        of_root || String::from_utf8_lossy(&arguments).contains(root)
    })
}

#[test]
fn it_runs_from_a_sealed_memory_file() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let python = r#"
import fcntl, os, sys
fd = os.memfd_create("torpor-launcher", os.MFD_ALLOW_SEALING)
with open(sys.argv[1], "rb") as file:
    os.sendfile(fd, file.fileno(), 0, 1 << 30)
fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0xF)
os.execv(f"/proc/self/fd/{fd}", sys.argv[1:])
"#;
    let mut bundle = Bundle::new(&["sleep", "100"])?;
    let hook = format!("cat > {}", bundle.directory.join("state.json").display());
    bundle.spec["hooks"] = json!({"createContainer": [
        {"path": "/bin/sh", "args": ["sh", "-c", hook], "env": ["PATH=/bin"]},
    ]});
    bundle.create(&[])?.ok()?;
    bundle.delete()?.ok()?;
    let config = bundle.path().join("config.json");
    let create = std::process::Command::new("python3")
        .args(["-c", python, &launcher(), "create", "--id", &bundle.id, "--root"])
        .arg(bundle.oci())
        .arg("--bundle")
        .arg(bundle.path())
        .arg("--spec")
        .arg(config)
        .status()?;
    assert!(create.success());
    let init: serde_json::Value =
        serde_json::from_slice(&fs::read(bundle.oci().join(format!("{}-bundle/init.json", bundle.id)))?)?;
    let exe = fs::read_link(format!("/proc/{}/exe", init["pid"]))?;
    assert!(exe.display().to_string().starts_with("/memfd:"), "{exe:?}");
    let state: serde_json::Value = serde_json::from_slice(&fs::read(bundle.directory.join("state.json"))?)?;
    assert_eq!(state["bundle"], json!(bundle.path()));
    Ok(())
}
