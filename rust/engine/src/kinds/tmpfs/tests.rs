#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};
use torpor_image::{HeaderInfo, Reader, Writer};
use torpor_sys::{Pid, proc};

use super::*;
use crate::bounds::Bounds;
use crate::error::Error;
use crate::kinds::creds::IdMaps;
use crate::kinds::mounts::Table;
use crate::stage::Cancel;

/// A process with mounts of its own: a tmpfs at /mnt, and what `script` does.
struct Container(Child);

impl Container {
    fn new(script: &str) -> Container {
        let script = format!(
            "set -e; umask 022; mount -t tmpfs -o size=64m none /mnt; cd /mnt; {script}\necho ready; exec sleep 600"
        );
        let mut command = Command::new("unshare");
        command.args(["-m", "bash", "-c", &script]).stdout(Stdio::piped());
        let mut child = Container(command.spawn().unwrap());
        let mut ready = [0; 6];
        child.0.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        child
    }

    fn pid(&self) -> Pid {
        self.0.id() as Pid
    }

    fn path(&self, path: &str) -> PathBuf {
        format!("/proc/{}/root/mnt/{path}", self.pid()).into()
    }

    /// All that is in the tmpfs, one line each; `listed` in the order in which it is listed.
    fn look(&self, listed: bool) -> String {
        let sort = if listed { "cat" } else { "LC_ALL=C sort" };
        let format = "%P %y %m %U:%G %s %b %n %T+ %l\\n";
        let script = format!("cd /proc/{}/root/mnt && find . -printf '{format}' | {sort}", self.pid());
        let output = Command::new("bash").args(["-c", &script]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A directory of our own outside of every container.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("torpor-tmpfs-{}-{count}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Scratch(path)
    }

    fn writer(&self) -> Writer {
        Writer::create(&self.0.join("image"), HeaderInfo::new("test")).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Image {
    states: Vec<State>,
    warnings: Vec<String>,
    reader: Reader,
    _scratch: Scratch,
}

fn committed(writer: Writer, scratch: Scratch, states: Vec<State>, warnings: Vec<String>) -> Image {
    writer.commit().unwrap();
    let reader = Reader::open(&scratch.0.join("image")).unwrap();
    let json = serde_json::to_string(&states).unwrap();
    Image {
        states: serde_json::from_str(&json).unwrap(),
        warnings,
        reader,
        _scratch: scratch,
    }
}

fn save(container: &Container) -> Image {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let mut warnings = Vec::new();
    let pid = container.pid();
    let maps = IdMaps {
        uids: proc::id_map(pid, "uid_map").unwrap(),
        gids: proc::id_map(pid, "gid_map").unwrap(),
    };
    let mut blob = |bytes: &[u8]| Ok(writer.append_blob(bytes)?);
    let states = collect(pid, &Table::of(pid).unwrap(), &maps, &mut blob, &mut warnings).unwrap();
    warnings.retain(|w| w.starts_with("/mnt"));
    committed(writer, scratch, states, warnings)
}

/// An image of one tmpfs with these lines. `{"data": [at, "text"]}` stands for content.
fn forged(lines: &[Value]) -> Image {
    let scratch = Scratch::new();
    let mut writer = scratch.writer();
    let mut text = String::new();
    for line in lines {
        let mut line = line.clone();
        if let Some(data) = line.get("data").and_then(Value::as_array).cloned() {
            let blob = writer.append_blob(data[1].as_str().unwrap().as_bytes()).unwrap();
            line = json!({"data": {"at": data[0], "bytes": blob}});
        }
        text += &format!("{line}\n");
    }
    let listing = vec![writer.append_blob(text.as_bytes()).unwrap()];
    let state = State {
        point: "/mnt".into(),
        nodes: 1,
        bytes: 0,
        limit: 0,
        listing,
    };
    committed(writer, scratch, vec![state], Vec::new())
}

fn everything() -> Bounds {
    Bounds::of(&Value::Null)
}

/// An ordinary user without any capability.
fn confined() -> Bounds {
    Bounds::of(&json!({"process": {"user": {"uid": 1000}, "capabilities": {"bounding": []}}}))
}

fn fill_with(image: &Image, container: &Container, bounds: &Bounds) -> Result<(), Error> {
    let cancel = Cancel::default();
    rebuild(&image.states, &image.reader, container.pid(), bounds, &cancel)
}

fn plan_with(image: &Image, container: &Container, bounds: &Bounds) -> Result<(), Error> {
    plan(
        &image.states,
        &image.reader,
        container.pid(),
        bounds,
        &Cancel::default(),
    )
}

/// Both refuse it, with the same words.
fn refused(image: &Image, container: &Container, bounds: &Bounds) -> (&'static str, String) {
    let planned = plan_with(image, container, bounds).unwrap_err();
    let built = fill_with(image, container, bounds).unwrap_err();
    assert_eq!((planned.code(), planned.to_string()), (built.code(), built.to_string()));
    (planned.code(), planned.to_string())
}

fn meta(mode: u32, uid: u32) -> Value {
    json!({"mode": mode, "uid": uid, "gid": 0, "atime": 1, "mtime": 2})
}

fn root() -> Value {
    json!({"directory": {"path": "", "meta": meta(0o1777, 0)}})
}

fn node(name: &str, kind: Value) -> Value {
    json!({"node": {"name": name, "kind": kind, "meta": meta(0o644, 0)}})
}

#[test]
fn another_tmpfs_becomes_the_same() {
    let script = "
        mkdir -p a/b/c empty sub; echo content > a/b/file; ln a/b/file a/other; ln -s /nowhere a/link
        mkfifo -m 600 fifo; mknod device c 1 7; mknod disk b 7 250; truncate -s 40M sparse; echo end >> sparse
        fallocate -l 1M reserved; head -c 3000001 /dev/urandom > random; chown 3:4 random; chmod 4711 random
        touch -h -d '1969-01-01 00:00:00.5' a/link; for i in {1..40}; do echo > a/b/c/$i; done; rm a/b/c/[24680]
        mount -t tmpfs none sub; echo above > sub/file; chmod 2775 a; python3 -c 'import socket; socket.socket(1).bind(\"socket\")'
        setfattr -n user.x -v 0sAP8= a/b/file 2>/dev/null || true; touch -d '2001-02-03' . ";
    let before = Container::new(script);
    let image = save(&before);
    assert_eq!(image.states.len(), 2);
    let state = &image.states[0];
    // Not counted: the second name of a file, what is mounted, and what is in it.
    assert_eq!(
        state.nodes as usize,
        before.look(false).lines().count() - 3,
        "{state:?}"
    );
    assert_eq!(state.limit, 64 << 20);
    assert!(image.warnings.is_empty(), "{:?}", image.warnings);

    let junk = "
        mkdir -p sub fifo/x/y random; ln -s /etc a; ln -s /etc/passwd sparse; echo old > device; mkfifo extra; mkdir -p more/and/more
        mount -t tmpfs none sub; mkdir -p keep/here; mount -t tmpfs none keep/here; touch keep/here/file keep/there; ln -s /nowhere link ";
    let after = Container::new(junk);
    let mut first = image;
    first.states.truncate(1);
    plan_with(&first, &after, &everything()).unwrap();
    for _ in 0..2 {
        fill_with(&first, &after, &everything()).unwrap();
        let mounted = after.path("keep/here/file").exists() && !after.path("keep/there").exists();
        assert!(mounted, "what is mounted stays, with the directories that lead there");
        // The directory at the top has one more entry, and what is at sub is another mount.
        let rest = |text: &str| -> Vec<String> {
            let is_it = |l: &&str| ![" ", "sub", "keep"].iter().any(|p| l.starts_with(p));
            text.lines().filter(is_it).map(Into::into).collect()
        };
        assert_eq!(rest(&after.look(false)), rest(&before.look(false)));
    }
    let same = |path: &str| fs::read(before.path(path)).unwrap() == fs::read(after.path(path)).unwrap();
    assert!(same("random") && same("sparse") && same("reserved") && same("a/other"));
}

#[test]
fn order_and_content_survive_twice() {
    let before = Container::new(
        "for i in 5 3 9 1; do echo $i > $i; done; rm 3; head -c 70000 /dev/urandom > r; mkdir d; touch d/{a..z}",
    );
    let between = Container::new("");
    fill_with(&save(&before), &between, &everything()).unwrap();
    let after = Container::new("");
    fill_with(&save(&between), &after, &everything()).unwrap();
    assert_eq!(before.look(true), after.look(true));
}

#[test]
fn what_is_not_a_tmpfs_of_its_own_is_not_touched() {
    let image = save(&Container::new("echo > file"));
    let shared = Scratch::new();
    let outside = Command::new("mount")
        .args(["-t", "tmpfs", "none"])
        .arg(&shared.0)
        .status()
        .unwrap();
    assert!(outside.success());
    let path = shared.0.display();
    let others = [
        "umount /mnt".to_string(),
        format!("mount --bind {path} /mnt"),
        "mount -o remount,ro /mnt".into(),
    ];
    let refusals: Vec<_> = others
        .iter()
        .map(|script| refused(&image, &Container::new(&format!("cd /; {script}")), &everything()))
        .collect();
    let left_alone = fs::read_dir(&shared.0).unwrap().next().is_none();
    assert!(Command::new("umount").arg(&shared.0).status().unwrap().success());
    assert!(left_alone);
    for (code, text) in refusals {
        assert!(code == "unsupported" && text.contains("mount /mnt"), "{text}");
    }
}

#[test]
fn hidden_files_are_named() {
    let image = save(&Container::new(
        "echo > file; cd /; mount -t tmpfs none /mnt; mkdir /mnt/x; mount -t tmpfs none /mnt/x; mount --bind /etc /mnt",
    ));
    assert!(image.states.is_empty());
    let hidden = |point: &str| format!("{point} is hidden by another mount: its files are not saved");
    assert_eq!(image.warnings, ["/mnt", "/mnt", "/mnt/x"].map(hidden));
}

#[test]
fn ramfs_is_carried_too() {
    let on_ramfs = "cd /; umount /mnt; mount -t ramfs none /mnt; cd /mnt; ";
    let before = Container::new(&format!(
        "{on_ramfs} echo small > small; head -c 70000 /dev/urandom > large; mkdir d"
    ));
    let after = Container::new(on_ramfs);
    fill_with(&save(&before), &after, &everything()).unwrap();
    assert_eq!(before.look(true), after.look(true));
    for file in ["small", "large"] {
        assert_eq!(
            fs::read(before.path(file)).unwrap(),
            fs::read(after.path(file)).unwrap()
        );
    }
}

#[test]
fn no_name_leads_out() {
    let outside = Scratch::new();
    let target = outside.0.to_str().unwrap();
    let file = json!({"file": {"size": 4}});
    let directory = |path: &str| json!({"directory": {"path": path, "meta": meta(0o755, 0)}});
    let link = node("way", json!({"symlink": {"target": target}}));
    let bad: Vec<Vec<Value>> = vec![
        vec![root(), node("../evil", file.clone())],
        vec![root(), node("..", file.clone())],
        vec![root(), node("", file.clone())],
        vec![root(), node(&format!("{target}/evil"), file.clone())],
        vec![root(), node("a\u{0}b", file.clone())],
        vec![root(), node(&"x".repeat(256), file.clone())],
        vec![root(), directory("../.."), node("evil", file.clone())],
        vec![root(), directory(target), node("evil", file.clone())],
        vec![root(), directory("./x"), node("evil", file.clone())],
        vec![
            root(),
            link.clone(),
            directory("way"),
            node("evil", file.clone()),
            json!({"data": [0, "evil"]}),
        ],
        vec![
            root(),
            link.clone(),
            json!({"node": {"name": "l", "kind": {"link": {"path": "way/evil"}}}}),
        ],
        vec![
            root(),
            json!({"node": {"name": "l", "kind": {"link": {"path": "../../etc/passwd"}}}}),
        ],
        vec![root(), json!({"node": {"name": "l", "kind": {"link": {"path": ""}}}})],
        vec![node("evil", file.clone())],
        vec![root(), json!({"node": {"name": "f", "kind": file}})],
        vec![root(), node("f", file.clone()), json!({"data": [1, "long"]})],
        vec![root(), node("f", file.clone()), json!({"data": [u64::MAX, "x"]})],
        vec![root(), json!({"data": [0, "x"]})],
        vec![
            root(),
            json!({"data": {"at": 0, "bytes": {"offset": 4096, "len": 1u64 << 60}}}),
        ],
        vec![root(), json!({"nonsense": 1})],
        vec![root(), node("f", json!({"file": {"size": u64::MAX}}))],
        vec![root(), node("twice", json!("fifo")), node("twice", file.clone())],
    ];
    fs::write(outside.0.join("there"), "old").unwrap();
    for lines in bad {
        let container = Container::new(&format!("ln -s {target} way; ln -s {target}/there f"));
        let result = fill_with(&forged(&lines), &container, &everything());
        assert!(result.is_err(), "{lines:?}");
        let left: Vec<_> = fs::read_dir(&outside.0)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(
            (
                left.len(),
                fs::read_to_string(outside.0.join("there")).unwrap().as_str()
            ),
            (1, "old"),
            "{lines:?}"
        );
        assert!(!PathBuf::from(format!("/proc/{}/root/evil", container.pid())).exists());
    }
}

#[test]
fn links_that_are_there_are_replaced_not_followed() {
    let outside = Scratch::new();
    let target = outside.0.to_str().unwrap();
    fs::write(outside.0.join("there"), "old").unwrap();
    let container = Container::new(&format!(
        "ln -s {target}/there file; ln -s {target} directory; ln -s {target}/there fifo"
    ));
    let lines = [
        root(),
        node("file", json!({"file": {"size": 3}})),
        json!({"data": [0, "new"]}),
        node("fifo", json!("fifo")),
        json!({"node": {"name": "directory", "kind": "directory"}}),
        json!({"directory": {"path": "directory", "meta": meta(0o700, 0)}}),
        node("there", json!({"file": {"size": 0}})),
    ];
    let image = forged(&lines);
    plan_with(&image, &container, &everything()).unwrap();
    fill_with(&image, &container, &everything()).unwrap();
    assert_eq!(fs::read_to_string(outside.0.join("there")).unwrap(), "old");
    assert_eq!(fs::metadata(outside.0.join("there")).unwrap().mode() & 0o777, 0o644);
    assert_eq!(fs::read_to_string(container.path("file")).unwrap(), "new");
    assert!(
        fs::symlink_metadata(container.path("fifo"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
    assert_eq!(fs::read(container.path("directory/there")).unwrap(), b"");
}

#[test]
fn no_more_power_than_the_container_has() {
    let container = || Container::new("mknod -m 600 null c 1 3; mkdir -m 755 d");
    let null = |mode: u32| {
        let kind = json!({"device": {"block": false, "rdev": libc::makedev(1, 3)}});
        json!({"node": {"name": "null", "kind": kind, "meta": meta(mode, 0)}})
    };
    let device = |name: &str, rdev: u64, block: bool| node(name, json!({"device": {"block": block, "rdev": rdev}}));
    let program = |mode: u32, uid: u32| json!({"node": {"name": "program", "kind": {"file": {"size": 0}}, "meta": meta(mode, uid)}});
    let mut trusted = node("t", json!({"file": {"size": 0}}));
    trusted["node"]["meta"]["attributes"] = json!([["trusted.x", "y"]]);
    let top = vec![root(), json!({"node": {"name": "d", "kind": "directory"}})];
    let d = |mode: u32, uid: u32| json!({"directory": {"path": "d", "meta": meta(mode, uid)}});
    let docker = Bounds::of(&json!({"process": {"user": {"uid": 0}, "capabilities": {"bounding":
        ["CAP_CHOWN", "CAP_FOWNER", "CAP_SETUID", "CAP_MKNOD"]}}}));
    let may: Vec<(Vec<Value>, &Bounds)> = vec![
        (vec![null(0o600)], &confined()),
        (vec![device("whiteout", 0, false)], &confined()),
        (vec![program(0o4755, 1000)], &confined()),
        (vec![program(0o755, 0)], &confined()),
        (vec![d(0o755, 0)], &confined()),
        (
            vec![
                null(0o666),
                device("new", 0x103, false),
                program(0o6755, 0),
                d(0o777, 5),
            ],
            &docker,
        ),
        (vec![trusted.clone()], &everything()),
    ]
    .into_iter()
    .map(|(lines, bounds)| (lines, Box::leak(Box::new(bounds.clone())) as &Bounds))
    .collect();
    for (lines, bounds) in may {
        let lines = [top.clone(), lines].concat();
        let (image, container) = (forged(&lines), container());
        plan_with(&image, &container, bounds).unwrap();
        fill_with(&image, &container, bounds).unwrap();
    }
    for lines in [
        vec![null(0o666)],
        vec![device("null", 0x105, false)],
        vec![device("disk", 0x700, true)],
        vec![device("disk", 0, true)],
        vec![program(0o4755, 0)],
        vec![program(0o2755, 1000)],
        vec![trusted],
        vec![d(0o777, 0)],
        vec![d(0o755, 1000)],
    ] {
        let (image, container) = (forged(&[top.clone(), lines.clone()].concat()), container());
        let before = container.look(false);
        assert_eq!(refused(&image, &container, &confined()).0, "refused-power", "{lines:?}");
        let now = container.look(false);
        let kept = now.lines().filter(|l| l.starts_with("null") || l.starts_with("d "));
        assert!(kept.into_iter().all(|l| before.contains(l)), "{lines:?}: {now}");
    }
}

#[test]
fn a_mount_in_the_way_of_a_file_is_named() {
    let mounted =
        Container::new("mkdir -p m; mount -t tmpfs none m; touch m/above; touch f; mount --bind /etc/hostname f");
    let in_it = json!({"directory": {"path": "m", "meta": meta(0o755, 0)}});
    let directory = json!({"node": {"name": "m", "kind": "directory"}});
    for lines in [
        vec![root(), node("m", json!("fifo"))],
        vec![root(), node("f", json!({"file": {"size": 1}}))],
        vec![root(), directory.clone(), in_it.clone(), node("x", json!("fifo"))],
    ] {
        let (code, text) = refused(&forged(&lines), &mounted, &everything());
        assert!(
            code == "unsupported" && text.contains("has a mount where the image has a file"),
            "{text}"
        );
    }
    let covered = |name: &str| json!({"node": {"name": name, "kind": "covered"}});
    for lines in [
        vec![root(), directory, node("f", json!({"file": {"size": 0}})), in_it],
        vec![root(), covered("m"), covered("f"), covered("not there")],
        vec![root()],
    ] {
        let image = forged(&lines);
        plan_with(&image, &mounted, &everything()).unwrap();
        fill_with(&image, &mounted, &everything()).unwrap();
        assert!(mounted.path("m/above").exists() && fs::metadata(mounted.path("f")).unwrap().len() > 0);
    }
}

#[test]
fn a_smaller_tmpfs_is_refused_before_anything_is_written() {
    let image = save(&Container::new("head -c 2M /dev/zero > file"));
    let small = Container::new("mount -o remount,size=1m /mnt");
    let error = plan_with(&image, &small, &everything()).unwrap_err();
    assert!(error.to_string().contains("give it a larger size"), "{error}");
    // The image may lie about what it needs.
    let mut lying = image;
    lying.states[0].bytes = 0;
    let error = fill_with(&lying, &small, &everything()).unwrap_err();
    assert_eq!((error.code(), error.object()), ("unsupported", Some("/mnt/file")));
}

#[test]
fn a_cancelled_restore_stops() {
    let image = save(&Container::new("echo > file"));
    let cancel = Cancel::default();
    cancel.cancel();
    let error = rebuild(
        &image.states,
        &image.reader,
        Container::new("").pid(),
        &everything(),
        &cancel,
    )
    .unwrap_err();
    assert_eq!(error.code(), "cancelled");
}

#[test]
fn immutable_files_are_refused_by_name() {
    let container = Container::new("touch file; chattr +i file 2>/dev/null || mv file without");
    if !container.path("file").exists() {
        return;
    }
    let pid = container.pid();
    let mut blob = |_: &[u8]| Ok(BlobRef { offset: 0, len: 0 });
    let error = collect(
        pid,
        &Table::of(pid).unwrap(),
        &IdMaps::default(),
        &mut blob,
        &mut Vec::new(),
    )
    .unwrap_err();
    assert_eq!((error.code(), error.object()), ("unsupported", Some("/mnt/file")));
}

#[test]
fn ids_are_translated_both_ways() {
    let map = [(0, 100_000, 1000), (5000, 7, 1)];
    for (in_container, here) in [(0, 100_000), (999, 100_999), (5000, 7)] {
        assert_eq!((inside(&map, here), outside(&map, in_container)), (in_container, here));
    }
    assert_eq!((inside(&map, 0), outside(&map, 1000)), (STRANGER, STRANGER));
    assert_eq!(outside(&[(0, 0, u32::MAX)], STRANGER), STRANGER);

    let entry = |tag: u8, id: u8| [tag, 0, 6, 0, id, 0, 0, 0];
    let mut acl = [&[2, 0, 0, 0][..], &entry(1, 9), &entry(2, 9), &entry(8, 9)].concat();
    translate(b"system.posix_acl_access", &mut acl, |_| 1, |_| 2);
    assert_eq!(acl[4..], [entry(1, 9), entry(2, 1), entry(8, 2)].concat());
    let mut capability = [vec![0, 0, 0, 3], vec![0; 16], vec![9, 0, 0, 0]].concat();
    translate(b"security.capability", &mut capability, |id| id + 1, |_| 0);
    assert_eq!(capability[20..], [10, 0, 0, 0]);
    for odd in [&b""[..], b"\x02", b"\x02\0\0\0\x02\0"] {
        translate(b"system.posix_acl_default", &mut odd.to_vec(), |_| 0, |_| 0);
    }
}

#[test]
fn permissions_survive_their_owner() {
    let before = Container::new("cp /bin/true p; chown 12:34 p; chmod 6755 p; mkdir -m 7711 d; chown 5:6 d");
    let after = Container::new("");
    fill_with(&save(&before), &after, &everything()).unwrap();
    let mode = |path: &str| fs::metadata(after.path(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("p"), mode("d")), (0o6755, 0o7711));
    assert_eq!(before.look(false), after.look(false));
}
