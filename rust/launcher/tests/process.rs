//! What the program of a container finds when it starts, and what keeps it from starting.

mod support;

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};
use support::{Bundle, Outcome, possible, process, until};

#[test]
fn the_program_is_the_user_it_should_be() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let script = "id; pwd; umask; echo $HOME; env | grep ORDER; grep -E 'Cap(Prm|Bnd)|NoNew' /proc/self/status; \
                  grep -E 'Sig(Ign|Blk)' /proc/self/status; ls /proc/self/fd";
    let mut bundle = Bundle::new(&["sh", "-c", script])?;
    fs::write(
        bundle.rootfs().join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nme:x:1000:1000::/home/me:/bin/sh\n",
    )?;
    let process = &mut bundle.spec["process"];
    process["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 0o27});
    process["cwd"] = json!("/made/for/it");
    process["env"] = json!(["PATH=/bin", "ORDER=1", "ORDER=2"]);
    process["capabilities"] = json!({"bounding": ["CAP_KILL", "CAP_SYS_RESOURCE"], "permitted": ["CAP_KILL"]});
    let output = bundle.run()?;
    let expected = [
        "uid=1000(me) gid=1001 groups=5,6",
        "/made/for/it",
        "0027",
        "/home/me",
        "ORDER=2",
        "CapPrm:\t0000000000000000",
        "CapBnd:\t0000000000000020",
        "NoNewPrivs:\t1",
        "SigBlk:\t0000000000000000",
        "SigIgn:\t0000000000000000",
    ];
    for line in expected {
        assert!(
            output.lines().any(|found| found == line),
            "{line:?} is not in\n{output}"
        );
    }
    // Three of its own, and the directory that ls reads.
    assert!(output.ends_with("0\n1\n2\n3\n"), "{output}");
    Ok(())
}

#[test]
fn a_program_without_capabilities_in_its_spec_has_none() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let bundle = Bundle::new(&[
        "sh",
        "-c",
        "grep Cap /proc/self/status | grep -v 0000000000000000; echo end",
    ])?;
    assert_eq!(bundle.run()?, "end\n");
    Ok(())
}

#[test]
fn the_filter_is_loaded_with_and_without_new_privileges() -> Outcome {
    if !possible() {
        return Ok(());
    }
    for no_new_privileges in [true, false] {
        let script = "mkdir /tmp/x 2>&1; grep -E 'Seccomp:|NoNew' /proc/self/status";
        let mut bundle = Bundle::new(&["sh", "-c", script])?;
        bundle.spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        bundle.spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"},
        ]});
        let output = bundle.run()?;
        let flag = u8::from(no_new_privileges);
        let expected = format!(
            "mkdir: can't create directory '/tmp/x': Operation not permitted\nNoNewPrivs:\t{flag}\nSeccomp:\t2\n"
        );
        assert_eq!(output, expected);
    }
    Ok(())
}

#[test]
fn a_user_namespace_maps_its_root() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let mut bundle = Bundle::new(&["sleep", "100"])?;
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    if let Some(namespaces) = bundle.spec["linux"]["namespaces"].as_array_mut() {
        namespaces.push(json!({"type": "user"}));
    }
    bundle.spec["linux"]["uidMappings"] = map.clone();
    bundle.spec["linux"]["gidMappings"] = map;
    let pid = bundle.create(&[])?.ok()?["pid"].clone();
    bundle.start()?.ok()?;
    assert!(support::status(&pid)?.contains("Uid:\t100000\t"));
    // libcontainer would leave this one in the host's user namespace.
    let mut inside = process(&["sh", "-c", "cat /proc/self/uid_map; grep Uid /proc/self/status"]);
    inside["user"] = json!({"uid": 7, "gid": 8});
    let answer = bundle.exec(inside, &["--supervise"])?;
    assert_eq!(answer.code, 0, "{answer:?}");
    let output = bundle.output()?;
    assert!(output.contains("0     100000      65536"), "{output}");
    assert!(output.contains("Uid:\t7\t7\t7\t7"), "{output}");
    Ok(())
}

#[test]
fn one_more_process_joins_the_container() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let bundle = Bundle::new(&["sleep", "100"])?;
    bundle.create(&[])?.ok()?;
    // As runc has it: a container that waits to be started can be entered.
    assert_eq!(bundle.exec(process(&["true"]), &["--supervise"])?.code, 0);
    bundle.start()?.ok()?;
    let answer = bundle.exec(process(&["sh", "-c", "cat /proc/1/cmdline; exit 42"]), &["--supervise"])?;
    assert_eq!(answer.code, 42);
    assert_eq!(bundle.output()?, "sleep\u{0}100\u{0}");
    let answer = bundle.exec(process(&["nope"]), &[])?;
    assert_eq!(
        answer.error(),
        (
            "bad-spec".to_owned(),
            "exec: \"nope\": executable file not found in $PATH".to_owned()
        )
    );
    // Nothing of them stays where the container's state is.
    let names = |directory: &str| -> Outcome<Vec<String>> {
        let entries = fs::read_dir(bundle.oci().join(directory))?.flatten();
        Ok(entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect())
    };
    assert!(!names(&bundle.id)?.iter().any(|name| name.contains("tenant")));
    assert!(
        !names(&format!("{}-bundle", bundle.id))?
            .iter()
            .any(|name| name.starts_with("exec-"))
    );
    Ok(())
}

#[test]
fn a_terminal_is_sent_to_the_console_socket() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let mut bundle = Bundle::new(&["sh", "-c", "tty; read line; echo got $line"])?;
    assert_eq!(bundle.create(&["--console-socket", "/nowhere"])?.error().0, "bad-spec");
    bundle.spec["process"]["terminal"] = json!(true);
    assert_eq!(bundle.create(&[])?.error().0, "bad-spec");
    let path = bundle.directory.join("console.sock");
    let listener = UnixListener::bind(&path)?;
    bundle
        .create(&["--console-socket", &path.display().to_string()])?
        .ok()?;
    let master = receive(&listener)?;
    bundle.start()?.ok()?;
    nix::unistd::write(&master, b"it\n")?;
    let mut text = String::new();
    let mut terminal = fs::File::from(master);
    until(|| {
        let mut buffer = [0; 100];
        let count = terminal.read(&mut buffer).unwrap_or_default();
        text.push_str(&String::from_utf8_lossy(&buffer[..count]));
        text.contains("got it")
    })?;
    assert!(text.contains("/dev/pts/0"), "{text}");
    Ok(())
}

fn receive(listener: &UnixListener) -> Outcome<std::os::fd::OwnedFd> {
    use std::os::fd::AsRawFd;
    let (connection, _) = listener.accept()?;
    let mut buffer = [0; 100];
    let mut iov = [std::io::IoSliceMut::new(&mut buffer)];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let message = recvmsg::<()>(connection.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::empty())?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            let fd = fds.first().ok_or("no descriptor")?;
            return Ok(adopt(*fd));
        }
    }
    Err("no terminal was sent".into())
}

fn adopt(fd: std::os::fd::RawFd) -> std::os::fd::OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: it has just come with a message, for us alone.
    unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) }
}

#[test]
fn limits_that_cannot_be_had_are_lowered_and_told() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let mut bundle = Bundle::new(&["sleep", "100"])?;
    bundle.spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "hard": 1u64 << 29, "soft": 100}]);
    bundle.spec["process"]["oomScoreAdj"] = json!(500);
    let report = bundle.create(&[])?.ok()?;
    let limits = fs::read_to_string(format!("/proc/{}/limits", report["pid"]))?;
    let soft = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    assert_eq!(soft.and_then(|line| line.split_whitespace().next()), Some("100"));
    assert_eq!(
        fs::read_to_string(format!("/proc/{}/oom_score_adj", report["pid"]))?,
        "500\n"
    );
    let may = caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_RESOURCE)?;
    assert_eq!(report.get("warnings").is_none(), may, "{report}");
    Ok(())
}

#[test]
fn cgroups_are_seen_read_only_and_none_but_its_own() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let script = "grep -E ' (cgroup|cgroup2) ' /proc/self/mounts | grep -v 'ro,'; ls /sys/fs/cgroup/systemd /sys/fs/cgroup/memory";
    let bundle = Bundle::new(&["sh", "-c", script])?;
    let output = bundle.run()?;
    assert!(!output.contains(" rw,"), "{output}");
    assert!(!output.contains("torpor-"), "{output}");
    Ok(())
}

#[test]
fn every_hook_runs_once_and_sees_the_bundle() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let mut bundle = Bundle::new(&["cat", "/tmp/hook"])?;
    fs::set_permissions(bundle.rootfs().join("tmp"), fs::Permissions::from_mode(0o777))?;
    let log = bundle.directory.join("hooks");
    let hook = |name: &str, log: &str| {
        let script = format!("echo {name} $(cat) >> {log}");
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"]}])
    };
    let outside = log.display().to_string();
    let names = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"];
    let mut hooks = json!({"startContainer": hook("startContainer", "/tmp/hook")});
    for name in names {
        hooks[name] = hook(name, &outside);
    }
    bundle.spec["hooks"] = hooks;
    let output = bundle.run()?;
    let log = fs::read_to_string(log)?;
    let lines: Vec<&str> = log.lines().chain(output.lines()).collect();
    let found: Vec<&str> = lines.iter().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(
        found,
        [
            "prestart",
            "createRuntime",
            "createContainer",
            "poststart",
            "poststop",
            "startContainer"
        ]
    );
    for line in lines {
        let state: Value = serde_json::from_str(line.split_once(' ').map(|(_, state)| state).unwrap_or_default())?;
        assert_eq!(state["bundle"], json!(bundle.path()), "{line}");
        assert_eq!(state["id"], json!(bundle.id), "{line}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_built_is_said_in_one_line_and_leaves_nothing() -> Outcome {
    if !possible() {
        return Ok(());
    }
    type Change = fn(&mut Value);
    let cases: &[(&str, &str, Change)] = &[
        ("bad-spec", "config.json lacks \"process\"", |spec| {
            drop(spec.as_object_mut().map(|spec| spec.remove("process")))
        }),
        ("bad-spec", "config.json lacks \"root\"", |spec| {
            drop(spec.as_object_mut().map(|spec| spec.remove("root")))
        }),
        ("bad-spec", "config.json lacks \"process.args\"", |spec| {
            spec["process"]["args"] = json!([])
        }),
        (
            "bad-spec",
            "root.path /nonexistent: no such file or directory",
            |spec| spec["root"]["path"] = json!("/nonexistent"),
        ),
        ("bad-spec", "process.cwd must be an absolute path", |spec| {
            spec["process"]["cwd"] = json!("x")
        }),
        ("bad-spec", "linux.cgroupsPath \"/\" is the root cgroup", |spec| {
            spec["linux"]["cgroupsPath"] = json!("/")
        }),
        ("bad-spec", "process.env: \"X\" is not NAME=VALUE", |spec| {
            spec["process"]["env"] = json!(["X"])
        }),
        (
            "bad-spec",
            "exec: \"nope\": executable file not found in $PATH",
            |spec| spec["process"]["args"] = json!(["nope"]),
        ),
        (
            "bad-spec",
            "exec: \"/nope\": stat /nope: no such file or directory",
            |spec| spec["process"]["args"] = json!(["/nope"]),
        ),
        ("bad-spec", "exec: \"/etc/data\": permission denied", |spec| {
            spec["process"]["args"] = json!(["/etc/data"])
        }),
        ("bad-spec", "exec: \"/bin\": is a directory", |spec| {
            spec["process"]["args"] = json!(["/bin"])
        }),
        ("bad-spec", "hook \"/bin/none\" is not a file", |spec| {
            spec["hooks"] = json!({"createRuntime": [{"path": "/bin/none"}]})
        }),
        (
            "bad-spec",
            "unable to set hostname without a private UTS namespace",
            |spec| {
                if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
                    namespaces.retain(|namespace| namespace["type"] != "uts");
                }
            },
        ),
        (
            "launcher",
            "failed to run create runtime hooks: hook command exited with non-zero exit code: 1",
            |spec| {
                spec["hooks"] = json!({"createRuntime": [{"path": "/bin/false"}]});
            },
        ),
        (
            "launcher",
            "mount /nonexistent to /x: no such file or directory",
            |spec| {
                if let Some(mounts) = spec["mounts"].as_array_mut() {
                    mounts.push(
                        json!({"destination": "/x", "type": "bind", "source": "/nonexistent", "options": ["rbind"]}),
                    );
                }
            },
        ),
    ];
    for (code, message, change) in cases {
        let mut bundle = Bundle::new(&["true"])?;
        fs::write(bundle.rootfs().join("etc/data"), "")?;
        change(&mut bundle.spec);
        let answer = bundle.create(&[])?;
        assert_eq!(answer.error(), ((*code).to_owned(), (*message).to_owned()));
        assert_eq!(answer.code, 1);
        assert_eq!(bundle.traces()?, Vec::<String>::new(), "{message}");
    }
    Ok(())
}

#[test]
fn what_only_shows_at_the_start_is_told_by_start() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let bundle = Bundle::new(&["/bin/script"])?;
    let script = bundle.rootfs().join("bin/script");
    fs::write(&script, "no program\n")?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    bundle.create(&[])?.ok()?;
    assert_eq!(bundle.start()?.error().1, "exec: \"/bin/script\": exec format error");
    Ok(())
}

#[test]
fn a_tmpfs_can_start_with_the_files_of_the_image() -> Outcome {
    if !possible() {
        return Ok(());
    }
    let mut bundle = Bundle::new(&[
        "sh",
        "-c",
        "cat /etc/deep/file /etc/link; id -u; echo new > /etc/new; ls -ld /etc",
    ])?;
    let etc = bundle.rootfs().join("etc");
    fs::create_dir(etc.join("deep"))?;
    fs::write(etc.join("deep/file"), "found\n")?;
    std::os::unix::fs::symlink("deep/file", etc.join("link"))?;
    fs::set_permissions(&etc, fs::Permissions::from_mode(0o750))?;
    if let Some(mounts) = bundle.spec["mounts"].as_array_mut() {
        let options = ["rprivate", "nosuid", "nodev", "tmpcopyup", "size=1m"];
        mounts.push(json!({"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": options}));
    }
    let output = bundle.run()?;
    assert!(output.starts_with("found\nfound\n0\ndrwxr-x---"), "{output}");
    assert!(!etc.join("new").exists());
    Ok(())
}
