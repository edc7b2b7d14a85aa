//! The place where an image is written: a directory claimed for one writer, and a file in it that nobody sees until it is published.
//!
//! The file has no name at all while it is written (`O_TMPFILE`), so that a writer killed at any moment leaves nothing behind. Where the
//! file system cannot do that it has a hidden name and a lock, and the next writer sweeps it up if its owner died.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg, OFlag, RenameFlags, open, openat, renameat, renameat2};
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::{UnlinkatFlags, fsync, linkat, unlinkat};

use crate::error::Error;
use crate::header::random_name;
use crate::layout::FILE_NAME;

const HIDDEN_PREFIX: &str = ".checkpoint.img.";
const HIDDEN_SUFFIX: &str = ".tmp";
/// How often a directory that vanishes between two steps is made again.
const ATTEMPTS: usize = 16;

/// Whether the file may be without a name while it is written. Tests and file systems without `O_TMPFILE` use the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Naming {
    Nameless,
    #[cfg_attr(
        not(test),
        expect(
            dead_code,
            reason = "the fallback is chosen by the file system, tests choose it by name"
        )
    )]
    Hidden,
}

/// A claimed directory and the unpublished file in it. Drop leaves the directory tree as it was found.
#[derive(Debug)]
pub(crate) struct Place {
    /// Where the image will appear.
    target: PathBuf,
    dir: PathBuf,
    claim: Claim,
    /// Directories made for this image.
    made: Made,
    file: Unpublished,
    /// The name of the file, if it has one.
    hidden: Option<String>,
}

/// The file, with the lock that tells a living writer from a dead one. A file without a name needs none.
#[derive(Debug)]
enum Unpublished {
    Locked(Flock<File>),
    Unlocked(File),
}

/// The directory, with the lock that keeps other writers out where the file system can lock directories.
#[derive(Debug)]
enum Claim {
    Locked(Flock<OwnedFd>),
    Unlocked(OwnedFd),
}

impl Claim {
    fn fd(&self) -> &OwnedFd {
        match self {
            Claim::Locked(lock) => lock,
            Claim::Unlocked(fd) => fd,
        }
    }
}

impl Place {
    /// Makes `dir` and its parents, claims it, and opens the file.
    pub(crate) fn claim(dir: &Path, naming: Naming) -> Result<Place, Error> {
        if dir.as_os_str().is_empty() {
            return Err(Error::NotADirectory {
                path: dir.to_path_buf(),
            });
        }
        // Absolute, so that a change of the working directory cannot make Drop remove something else.
        let dir = std::path::absolute(dir).map_err(|error| Error::io(dir, "resolve", error))?;
        let mut made = Made(Vec::new());
        let claim = claim_directory(&dir, &mut made)?;
        let target = dir.join(FILE_NAME);
        match fstatat(claim.fd(), FILE_NAME, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => {}
            Ok(_) => return Err(Error::Exists { path: target }),
            Err(errno) => return Err(Error::errno_on(&target, "look for", errno)),
        }
        let (file, hidden) = open_file(&dir, claim.fd(), naming)?;
        Ok(Place {
            target,
            dir,
            claim,
            made,
            file,
            hidden,
        })
    }

    /// Where the image will appear, for messages.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// The file to write to.
    pub(crate) fn file(&self) -> &File {
        match &self.file {
            Unpublished::Locked(lock) => lock,
            Unpublished::Unlocked(file) => file,
        }
    }

    /// Gives the file its name, never over an existing one, and makes name and directories durable. The file must be on disk already.
    pub(crate) fn publish(mut self) -> Result<PathBuf, Error> {
        match self.give_name() {
            Ok(()) => {}
            Err(Errno::EEXIST) => {
                return Err(Error::Exists {
                    path: self.target.clone(),
                });
            }
            Err(errno) => return Err(Error::errno_on(&self.target, "create", errno)),
        }
        self.hidden = None;
        if let Err(error) = self.sync_directories() {
            // The name might not survive a power cut, and the caller will say that there is no image: so there must be none.
            let _ = unlinkat(self.claim.fd(), FILE_NAME, UnlinkatFlags::NoRemoveDir);
            return Err(error);
        }
        self.made.0.clear();
        Ok(self.target.clone())
    }

    fn give_name(&self) -> Result<(), Errno> {
        let dir = self.claim.fd();
        let Some(hidden) = self.hidden.as_deref() else {
            let file = self.file();
            // By descriptor needs CAP_DAC_READ_SEARCH before Linux 6.10; by /proc needs /proc.
            let empty = linkat(file.as_fd(), "", dir, FILE_NAME, AtFlags::AT_EMPTY_PATH);
            return match empty {
                Err(Errno::ENOENT | Errno::EPERM | Errno::EINVAL | Errno::EACCES) => {
                    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                    linkat(AT_FDCWD, path.as_str(), dir, FILE_NAME, AtFlags::AT_SYMLINK_FOLLOW)
                }
                other => other,
            };
        };
        match renameat2(dir, hidden, dir, FILE_NAME, RenameFlags::RENAME_NOREPLACE) {
            Err(Errno::EINVAL | Errno::ENOSYS) => {}
            other => return other,
        }
        // File systems without RENAME_NOREPLACE (NFS): a hard link never replaces either.
        match linkat(dir, hidden, dir, FILE_NAME, AtFlags::empty()) {
            Ok(()) => unlinkat(dir, hidden, UnlinkatFlags::NoRemoveDir),
            Err(Errno::EPERM | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EMLINK) => {
                // Neither of the two: the claim on the directory has to do.
                match fstatat(dir, FILE_NAME, AtFlags::AT_SYMLINK_NOFOLLOW) {
                    Ok(_) => Err(Errno::EEXIST),
                    Err(Errno::ENOENT) => renameat(dir, hidden, dir, FILE_NAME),
                    Err(errno) => Err(errno),
                }
            }
            other => other,
        }
    }

    fn sync_directories(&self) -> Result<(), Error> {
        // What file systems answer that cannot sync a directory is no failure.
        let done = |result: nix::Result<()>| if result == Err(Errno::EINVAL) { Ok(()) } else { result };
        done(fsync(self.claim.fd())).map_err(|errno| Error::errno_on(&self.dir, "sync", errno))?;
        for parent in self.made.0.iter().filter_map(|made| made.parent()) {
            let opened = File::open(parent).map_err(|error| Error::io(parent, "open", error))?;
            done(fsync(&opened)).map_err(|errno| Error::errno_on(parent, "sync", errno))?;
        }
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Before the fields are dropped, and with them the locks: whoever gets the lock next finds the place tidy.
        if let Some(hidden) = self.hidden.take() {
            let _ = unlinkat(self.claim.fd(), hidden.as_str(), UnlinkatFlags::NoRemoveDir);
        }
        self.made.remove();
    }
}

/// Directories that were made, outermost first; Drop removes those that are empty.
#[derive(Debug)]
struct Made(Vec<PathBuf>);

impl Made {
    fn remove(&mut self) {
        while let Some(dir) = self.0.pop() {
            if fs::remove_dir(dir).is_err() {
                self.0.clear();
            }
        }
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        self.remove();
    }
}

fn open_file(dir: &Path, dir_fd: &OwnedFd, naming: Naming) -> Result<(Unpublished, Option<String>), Error> {
    if naming == Naming::Nameless {
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        match openat(dir_fd, ".", flags, Mode::S_IRUSR | Mode::S_IWUSR) {
            Ok(fd) => return Ok((Unpublished::Unlocked(File::from(fd)), None)),
            // What file systems answer that have no such files.
            Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL | Errno::ENOENT | Errno::ENOSYS) => {}
            Err(errno) => return Err(Error::errno_on(dir, "create a file in", errno)),
        }
    }
    sweep(dir, dir_fd)?;
    for _ in 0..ATTEMPTS {
        if let Some((file, name)) = open_hidden(dir, dir_fd)? {
            return Ok((file, Some(name)));
        }
    }
    Err(Error::Busy {
        path: dir.to_path_buf(),
    })
}

/// Makes a file with a hidden name and locks it. `None` if another writer took it for a leftover before it was locked.
fn open_hidden(dir: &Path, dir_fd: &OwnedFd) -> Result<Option<(Unpublished, String)>, Error> {
    let name = format!("{HIDDEN_PREFIX}{}{HIDDEN_SUFFIX}", random_name());
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let file = match openat(dir_fd, name.as_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR) {
        Ok(fd) => File::from(fd),
        Err(Errno::EEXIST) => return Ok(None),
        Err(errno) => return Err(Error::errno_on(dir, "create a file in", errno)),
    };
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Unpublished::Locked(lock),
        Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
        Err((file, _)) => Unpublished::Unlocked(file),
    };
    let ours = match &file {
        Unpublished::Locked(lock) => lock.metadata(),
        Unpublished::Unlocked(file) => file.metadata(),
    };
    match (fstatat(dir_fd, name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW), ours) {
        (Ok(named), Ok(ours)) if named.st_dev == ours.dev() && named.st_ino == ours.ino() => Ok(Some((file, name))),
        _ => Ok(None),
    }
}

/// Removes files of dead writers; refuses when there is one of a living writer.
fn sweep(dir: &Path, dir_fd: &OwnedFd) -> Result<(), Error> {
    for entry in fs::read_dir(dir).map_err(|error| Error::io(dir, "list", error))? {
        let name = entry.map_err(|error| Error::io(dir, "list", error))?.file_name();
        if !is_hidden_name(&name) {
            continue;
        }
        let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let Ok(fd) = openat(dir_fd, name.as_os_str(), flags, Mode::empty()) else {
            continue;
        };
        match Flock::lock(fd, FlockArg::LockExclusiveNonblock) {
            // Unlinked under the lock. A leftover that cannot be removed does no harm: the new file has a name of its own.
            Ok(_lock) => drop(unlinkat(dir_fd, name.as_os_str(), UnlinkatFlags::NoRemoveDir)),
            Err((_, Errno::EWOULDBLOCK)) => {
                return Err(Error::Busy {
                    path: dir.to_path_buf(),
                });
            }
            Err(_) => {}
        }
    }
    Ok(())
}

fn is_hidden_name(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name.starts_with(HIDDEN_PREFIX.as_bytes()) && name.ends_with(HIDDEN_SUFFIX.as_bytes())
}

fn claim_directory(dir: &Path, made: &mut Made) -> Result<Claim, Error> {
    for _ in 0..ATTEMPTS {
        make_directories(dir, made)?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = match open(dir, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => continue,
            Err(errno) => return Err(Error::errno_on(dir, "open", errno)),
        };
        let claim = match Flock::lock(fd, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Claim::Locked(lock),
            Err((_, Errno::EWOULDBLOCK)) => {
                // The other writer lives in these directories now.
                made.0.clear();
                return Err(Error::Busy {
                    path: dir.to_path_buf(),
                });
            }
            // NFS does not lock what is open for reading only, others do not lock directories: publishing decides there.
            Err((fd, _)) => Claim::Unlocked(fd),
        };
        if names(dir, &claim) {
            return Ok(claim);
        }
        // A writer that gave up removed the directory between open and lock.
    }
    Err(Error::io(dir, "open", io::ErrorKind::NotFound.into()))
}

fn names(dir: &Path, claim: &Claim) -> bool {
    let ours = claim.fd().try_clone().and_then(|fd| File::from(fd).metadata());
    match (fs::metadata(dir), ours) {
        (Ok(named), Ok(ours)) => named.dev() == ours.dev() && named.ino() == ours.ino(),
        _ => false,
    }
}

fn make_directories(dir: &Path, made: &mut Made) -> Result<(), Error> {
    let mut path = PathBuf::new();
    for component in dir.components() {
        path.push(component);
        if fs::metadata(&path).is_ok_and(|found| found.is_dir()) {
            continue;
        }
        match fs::DirBuilder::new().mode(0o755).create(&path) {
            Ok(()) => made.0.push(path.clone()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if !fs::metadata(&path).is_ok_and(|found| found.is_dir()) {
                    return Err(Error::NotADirectory { path });
                }
            }
            Err(error) => return Err(Error::io(&path, "create", error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::testing::Scratch;

    fn names(dir: &Path) -> Vec<String> {
        fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn both_kinds_appear_complete_and_private_or_not_at_all() {
        for naming in [Naming::Nameless, Naming::Hidden] {
            let scratch = Scratch::new();
            let dir = scratch.path().join("a/b");
            let place = Place::claim(&dir, naming).unwrap();
            assert_eq!(
                dir.metadata().unwrap().mode() & 0o7022,
                0,
                "not writable by others, whatever the umask"
            );
            place.file().write_all(b"x").unwrap();
            assert!(!dir.join(FILE_NAME).exists());
            drop(place);
            assert!(names(scratch.path()).is_empty(), "{naming:?}");

            let place = Place::claim(&dir, naming).unwrap();
            place.file().write_all(b"x").unwrap();
            let path = place.publish().unwrap();
            assert_eq!(path, dir.join(FILE_NAME));
            assert_eq!(names(&dir), [FILE_NAME]);
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn a_name_that_appears_meanwhile_is_not_replaced() {
        for naming in [Naming::Nameless, Naming::Hidden] {
            let scratch = Scratch::new();
            let place = Place::claim(scratch.path(), naming).unwrap();
            fs::write(scratch.path().join(FILE_NAME), "theirs").unwrap();
            assert_eq!(place.publish().unwrap_err().code(), "image-exists");
            assert_eq!(names(scratch.path()), [FILE_NAME]);
            assert_eq!(fs::read(scratch.path().join(FILE_NAME)).unwrap(), b"theirs");
        }
    }

    #[test]
    fn leftovers_of_the_dead_are_swept_and_files_of_the_living_respected() {
        let scratch = Scratch::new();
        let dead = scratch.path().join(".checkpoint.img.0123456789abcdef.tmp");
        let other = scratch.path().join(".checkpoint.img.keep");
        fs::write(&dead, "half").unwrap();
        fs::write(&other, "not ours").unwrap();
        drop(Place::claim(scratch.path(), Naming::Hidden).unwrap());
        assert!(!dead.exists() && other.exists());

        // The lock on the directory would refuse first; this is for file systems that lock only files.
        fs::write(&dead, "living").unwrap();
        let lock = Flock::lock(File::open(&dead).unwrap(), FlockArg::LockExclusive).unwrap();
        assert_eq!(
            Place::claim(scratch.path(), Naming::Hidden).unwrap_err().code(),
            "image-exists"
        );
        assert!(dead.exists());
        drop(lock);
    }

    #[test]
    fn a_claimed_directory_is_refused_and_stays() {
        for naming in [Naming::Nameless, Naming::Hidden] {
            let scratch = Scratch::new();
            let dir = scratch.path().join("new");
            let first = Place::claim(&dir, naming).unwrap();
            let refused = Place::claim(&dir, naming).unwrap_err();
            assert!(matches!(refused, Error::Busy { .. }), "{refused}");
            first.file().write_all(b"x").unwrap();
            first.publish().unwrap();
            assert!(matches!(Place::claim(&dir, naming).unwrap_err(), Error::Exists { .. }));
        }
    }

    #[test]
    fn directories_that_somebody_else_uses_meanwhile_stay() {
        let scratch = Scratch::new();
        let place = Place::claim(&scratch.path().join("a/b/c"), Naming::Nameless).unwrap();
        fs::write(scratch.path().join("a/b/theirs"), "").unwrap();
        drop(place);
        assert!(scratch.path().join("a/b/theirs").exists() && !scratch.path().join("a/b/c").exists());
    }

    #[test]
    fn what_is_no_directory_is_refused_without_a_trace() {
        let scratch = Scratch::new();
        let file = scratch.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [file.clone(), file.join("below"), PathBuf::new()] {
            assert_eq!(
                Place::claim(&path, Naming::Nameless).unwrap_err().code(),
                "usage",
                "{path:?}"
            );
        }
        std::os::unix::fs::symlink("nowhere", scratch.path().join("dangling")).unwrap();
        assert_eq!(
            Place::claim(&scratch.path().join("dangling/x"), Naming::Nameless)
                .unwrap_err()
                .code(),
            "usage"
        );
        let mut left = names(scratch.path());
        left.sort();
        assert_eq!(left, ["dangling", "file"]);
    }

    #[test]
    fn a_checkpoint_that_is_a_dangling_link_counts_as_one() {
        let scratch = Scratch::new();
        std::os::unix::fs::symlink("nowhere", scratch.path().join(FILE_NAME)).unwrap();
        assert_eq!(
            Place::claim(scratch.path(), Naming::Nameless).unwrap_err().code(),
            "image-exists"
        );
    }
}
