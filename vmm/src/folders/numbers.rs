//! The guest's numbers for files and open files.
//!
//! Those of the file server change with the process and with the host's file systems. So the guest gets numbers of ours, which stand
//! for the same file in whatever process goes on from here: what is saved is a file's path and its inode's number, and where the
//! path leads to another file then, or to none, the guest is told that its number is stale (ESTALE), as with any network file system.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use catalyst_agent_protocol::container::JOINED_TREES;
use fuse_backend_rs::abi::fuse_abi::ROOT_ID;
use fuse_backend_rs::api::filesystem::{Context, FileSystem};
use fuse_backend_rs::api::server::Server;
use serde::{Deserialize, Serialize};

use super::FolderOwner;
use super::fuse::{self, Kind, Message, Pipe, Valid, answer, request};
use crate::devices::fs::Files;

/// Flags of open(2) that were for the first time only.
const ONCE: u32 = (libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC).cast_unsigned();
/// How long the guest does not ask again, where it need not: nobody changes a file and looks as fast.
const MOMENT: Duration = Duration::from_millis(100);
/// The same for folders and links of a container's root, which the host hardly changes.
const WHILE: Duration = Duration::from_secs(1);
/// The same where nothing ever changes.
const FOR_EVER: Duration = Duration::from_secs(1 << 30);
/// Longer than a file system's times may stand still while a file changes.
const TICK: Duration = Duration::from_secs(2);
/// LOOKUP.
const LOOKUP: u32 = 1;

/// What is saved of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedNumbers {
    /// The guest's first message, with which the file server is set up.
    init: Vec<u8>,
    nodes: Vec<SavedNode>,
    handles: Vec<SavedHandle>,
    last_node: u64,
    last_handle: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedNode {
    id: u64,
    lookups: u64,
    /// Below the root; empty if the file is gone.
    path: Vec<u8>,
    inode: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedHandle {
    id: u64,
    node: u64,
    flags: u32,
    folder: bool,
}

/// A file that the guest knows.
#[derive(Debug)]
struct Node {
    /// The file server's number; none for one that is stale.
    inner: Option<u64>,
    /// How often the guest looked it up and did not forget it.
    lookups: u64,
    /// The same between us and the file server.
    held: u64,
    /// In which of the folders below the root it is.
    folder: Arc<[u8]>,
    /// When the file was changed last, if that was over when the guest last opened it: what it has read since is what the file has, until
    /// this is another time.
    settled: Option<(i64, i64)>,
}

impl Node {
    fn new(inner: Option<u64>, folder: Arc<[u8]>) -> Self {
        Self { inner, lookups: 0, held: 0, folder, settled: None }
    }
}

/// A file or folder that the guest has open.
#[derive(Debug)]
struct Handle {
    inner: Option<u64>,
    node: u64,
    flags: u32,
    folder: bool,
}

/// What is served, of which it depends how long the guest does not ask again.
enum Served {
    /// Shared folders. Which ones there are is asked for each time, and so is each file's name: whoever opens a file, or looks at it by
    /// its name, sees it as it is.
    Folders,
    /// A container, whose root is in this folder, and in one of that name for each that joins. What is below our root stays as it is
    /// for as long as the container lives.
    Container(Arc<[u8]>),
}

/// How long the guest does not ask again.
struct Lasts {
    name: Duration,
    attributes: Duration,
}

/// Answers messages.
pub(super) struct Numbers {
    files: Arc<Files>,
    server: Server<Arc<Files>>,
    pipe: Pipe,
    nodes: HashMap<u64, Node>,
    by_inner: HashMap<u64, u64>,
    handles: HashMap<u64, Handle>,
    last_node: u64,
    last_handle: u64,
    init: Vec<u8>,
    owners: HashMap<Vec<u8>, (u32, u32)>,
    served: Served,
    /// Whose the files are here.
    host: (u32, u32),
    /// What is to be found again when the folders are mounted.
    saved: Option<SavedNumbers>,
}

/// Whether a folder is that of containers that join, or that of one of them: what is in those are trees, each a folder of its own.
fn is_of_joined(folder: &[u8]) -> bool {
    match folder.strip_prefix(JOINED_TREES.as_bytes()) {
        Some([]) => true,
        Some([b'/', name @ ..]) => !name.contains(&b'/'),
        _ => false,
    }
}

/// The name that a folder has among its container's trees.
fn tree_of(folder: &[u8]) -> &[u8] {
    let mut parts = folder.splitn(3, |byte| *byte == b'/');
    if parts.next() != Some(JOINED_TREES.as_bytes()) {
        return folder;
    }
    parts.nth(1).unwrap_or(folder)
}

impl Numbers {
    pub(super) fn new(files: Arc<Files>, pipe: Pipe, saved: SavedNumbers) -> Self {
        // SAFETY: no memory is involved, and neither fails.
        let host = unsafe { (libc::geteuid(), libc::getegid()) };
        let mut numbers = Self {
            server: Server::new(Arc::clone(&files)),
            files,
            pipe,
            nodes: HashMap::new(),
            by_inner: HashMap::new(),
            handles: HashMap::new(),
            last_node: ROOT_ID,
            last_handle: 0,
            init: Vec::new(),
            owners: HashMap::new(),
            served: Served::Folders,
            host,
            saved: Some(saved),
        };
        numbers.know_root();
        numbers
    }

    /// Whether messages can be answered: not before it is known which folders there are.
    pub(super) fn is_ready(&self) -> bool {
        self.saved.is_none()
    }

    fn know_root(&mut self) {
        let root = Node { lookups: 1, ..Node::new(Some(ROOT_ID), Arc::from(&b""[..])) };
        self.nodes.insert(ROOT_ID, root);
        self.by_inner.insert(ROOT_ID, ROOT_ID);
    }

    /// The folders are mounted, and belong to these in the guest.
    pub(super) fn set_owners(&mut self, folders: Vec<FolderOwner>) {
        let owner = |folder: FolderOwner| (folder.name.into_bytes(), (folder.uid, folder.gid));
        self.owners = folders.into_iter().map(owner).collect();
        if let Some(saved) = self.saved.take() {
            self.restore(saved);
        }
    }

    /// What is served is a container, whose root is in this folder.
    pub(super) fn serve_container(&mut self, root: &[u8]) {
        self.served = Served::Container(Arc::from(root));
    }

    fn is_container(&self) -> bool {
        matches!(self.served, Served::Container(_))
    }

    fn is_root_of_container(&self, folder: &[u8]) -> bool {
        matches!(&self.served, Served::Container(root) if tree_of(folder) == &**root)
    }

    /// The guest knows nothing and has nothing open.
    pub(super) fn forget_all(&mut self) {
        self.files.end_session();
        self.by_inner.clear();
        self.nodes.clear();
        self.handles.clear();
        self.init.clear();
        if self.saved.is_some() {
            self.saved = Some(SavedNumbers::default());
        }
        self.know_root();
    }

    /// Answers a message, if it has an answer.
    pub(super) fn answer(&mut self, message: Vec<u8>) -> Option<Vec<u8>> {
        let mut asked = Message(message);
        let (opcode, unique, id) = asked.header()?;
        let kind = Kind::of(opcode);
        match kind {
            Kind::Interrupt => return None,
            Kind::Forget => {
                self.forget(id, asked.u64(request::BODY)?);
                return None;
            }
            Kind::ForgetMany => {
                self.forget_many(&asked);
                return None;
            }
            Kind::Destroy => {
                self.forget_all();
                return Some(Message::done(unique).0);
            }
            Kind::Unknown => return Some(Message::refusal(unique, libc::ENOSYS).0),
            Kind::Init => self.init.clone_from(&asked.0),
            _ => {}
        }
        let (flags, handle) = (asked.u32(request::BODY).unwrap_or_default(), asked.u64(request::BODY));
        let folder = self.folder_of(id, opcode, &asked);
        if kind != Kind::Init && !self.translate(&mut asked, kind, id, &folder) {
            // What is gone can be closed.
            let closed = handle.filter(|_| kind == Kind::Close);
            let known = closed.and_then(|handle| self.handles.remove(&handle));
            let errno = if known.is_some() { 0 } else { libc::ESTALE };
            return Some(Message::refusal(unique, errno).0);
        }
        let mut answer = self.pipe.answer(&self.server, &mut asked);
        if answer.is_good() {
            self.translate_back(&mut answer, kind, (id, flags), &folder);
        }
        if kind == Kind::Close
            && let Some(handle) = handle
        {
            self.handles.remove(&handle);
        }
        Some(answer.0)
    }

    /// The folder that the file of a message's answer is in.
    fn folder_of(&self, id: u64, opcode: u32, asked: &Message) -> Arc<[u8]> {
        let name = || {
            let text = asked.0.get(request::BODY..).unwrap_or_default();
            text.split(|byte| *byte == 0).next().unwrap_or_default()
        };
        if id == ROOT_ID && opcode == LOOKUP {
            return Arc::from(name());
        }
        let of_parent =
            self.nodes.get(&id).map_or_else(|| Arc::from(&b""[..]), |node| Arc::clone(&node.folder));
        if opcode == LOOKUP && self.is_container() && is_of_joined(&of_parent) {
            return [&of_parent[..], b"/", name()].concat().into();
        }
        of_parent
    }

    fn inner(&self, id: u64) -> Option<u64> {
        self.nodes.get(&id)?.inner
    }

    /// Puts the file server's numbers into a message; false if one of the guest's stands for nothing.
    fn translate(&self, asked: &mut Message, kind: Kind, id: u64, folder: &[u8]) -> bool {
        let Some(inner) = self.inner(id) else { return false };
        asked.put_u64(request::NODE, inner);
        let handle_at = match kind {
            Kind::Link | Kind::Rename => {
                let Some(other) = asked.u64(request::BODY).and_then(|other| self.inner(other)) else {
                    return false;
                };
                asked.put_u64(request::BODY, other);
                return true;
            }
            Kind::Handle | Kind::Close => Some(request::BODY),
            Kind::Attributes => {
                let flags = asked.u32(request::GETATTR_FLAGS).unwrap_or_default();
                (flags & request::GETATTR_FH != 0).then_some(request::ATTR_HANDLE)
            }
            Kind::SetAttributes => {
                let valid = asked.u32(request::SETATTR_VALID).unwrap_or_default();
                self.mean_owner(asked, valid, folder);
                (valid & request::VALID_FH != 0).then_some(request::ATTR_HANDLE)
            }
            _ => None,
        };
        let Some(at) = handle_at else { return true };
        let inner = asked.u64(at).and_then(|handle| self.handles.get(&handle)?.inner);
        inner.is_some_and(|inner| {
            asked.put_u64(at, inner);
            true
        })
    }

    /// Puts the guest's numbers into an answer.
    fn translate_back(
        &mut self,
        answer: &mut Message,
        kind: Kind,
        (id, flags): (u64, u32),
        folder: &Arc<[u8]>,
    ) {
        match kind {
            Kind::Init => fuse::bound(answer),
            Kind::Entry | Kind::Link => {
                self.name_entry(answer, id, folder);
                self.last_for_ever(answer, answer::ENTRY_VALID, id);
            }
            Kind::Create => {
                let node = self.name_entry(answer, id, folder);
                self.name_handle(answer, answer::CREATED_HANDLE, (node, flags), false);
            }
            Kind::Open => {
                self.name_handle(answer, answer::HANDLE, (id, flags), false);
                self.keep_pages(answer, id, folder);
            }
            Kind::OpenFolder => self.name_handle(answer, answer::HANDLE, (id, flags), true),
            Kind::Attributes | Kind::SetAttributes => {
                self.show_owner(answer, answer::ATTR, folder);
                answer.put_valid(answer::ATTR_VALID, self.lasts(answer, answer::ATTR, id, folder).attributes);
                self.last_for_ever(answer, answer::ATTR_VALID, id);
            }
            _ => {}
        }
    }

    fn name_entry(&mut self, answer: &mut Message, parent: u64, folder: &Arc<[u8]>) -> u64 {
        self.show_owner(answer, answer::ENTRY_ATTR, folder);
        let lasts = self.lasts(answer, answer::ENTRY_ATTR, parent, folder);
        answer.put_valid(answer::ENTRY_VALID, lasts.name);
        answer.put_valid(answer::ENTRY_ATTR_VALID, lasts.attributes);
        let inner = answer.u64(answer::NODE).unwrap_or_default();
        if inner == 0 || inner == ROOT_ID {
            return inner;
        }
        let id = *self.by_inner.entry(inner).or_insert_with(|| {
            self.last_node += 1;
            self.last_node
        });
        let node = self.nodes.entry(id).or_insert_with(|| Node::new(Some(inner), Arc::clone(folder)));
        node.lookups += 1;
        node.held += 1;
        answer.put_u64(answer::NODE, id);
        id
    }

    fn name_handle(&mut self, answer: &mut Message, at: usize, (node, flags): (u64, u32), folder: bool) {
        let Some(inner) = answer.u64(at) else { return };
        self.last_handle += 1;
        let handle = Handle { inner: Some(inner), node, flags: flags & !ONCE, folder };
        self.handles.insert(self.last_handle, handle);
        answer.put_u64(at, self.last_handle);
    }

    /// Has the guest keep the pages that it has of a file of a container's root, if the file has not changed since they were read:
    /// its programs are started again and again. What changes a file twice within a tick of the host's clock leaves the same time, so
    /// that counts only when it has passed. Elsewhere programs of the host may write by shared mappings, which leave no time.
    fn keep_pages(&mut self, answer: &mut Message, id: u64, folder: &[u8]) {
        if !self.is_root_of_container(folder) {
            return;
        }
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let attributes = node.inner.map(|inner| self.files.getattr(&Context::new(), inner, None));
        let Some(Ok((attributes, _))) = attributes else { return };
        let changed = (attributes.st_ctime, attributes.st_ctime_nsec);
        if node.settled == Some(changed) {
            let flags = answer.u32(answer::OPEN_FLAGS).unwrap_or_default();
            answer.put_u32(answer::OPEN_FLAGS, flags | answer::KEEP_CACHE);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let is_over =
            u64::try_from(changed.0).is_ok_and(|changed| changed.saturating_add(TICK.as_secs()) < now);
        node.settled = is_over.then_some(changed);
    }

    /// Shows the owner's files as the guest's user's.
    fn show_owner(&self, answer: &mut Message, at: usize, folder: &[u8]) {
        let Some((uid, gid)) = self.owners.get(folder).copied() else { return };
        for (field, host, guest) in [(answer::UID, self.host.0, uid), (answer::GID, self.host.1, gid)] {
            if answer.u32(at + field) == Some(host) {
                answer.put_u32(at + field, guest);
            }
        }
    }

    /// How long what is said of a file holds, whose attributes are at `at`, and which is `asked` or in that.
    fn lasts(&self, answer: &Message, at: usize, asked: u64, folder: &[u8]) -> Lasts {
        let kind = answer.u32(at + answer::MODE).unwrap_or_default() & libc::S_IFMT;
        let is_way = matches!(kind, libc::S_IFDIR | libc::S_IFLNK);
        let (name, attributes) = match &self.served {
            Served::Folders if asked == ROOT_ID => (Duration::ZERO, Duration::ZERO),
            // Containers come and go.
            Served::Container(_) if is_of_joined(folder) => (Duration::ZERO, Duration::ZERO),
            Served::Container(_) if self.is_root_of_container(folder) => {
                if is_way {
                    (WHILE, WHILE)
                } else {
                    (MOMENT, MOMENT)
                }
            }
            _ => (if is_way { MOMENT } else { Duration::ZERO }, MOMENT),
        };
        Lasts { name, attributes }
    }

    /// Says that what is said of the root, or of what is in it, holds for ever.
    fn last_for_ever(&self, answer: &mut Message, field: Valid, asked: u64) {
        if asked == ROOT_ID && self.is_container() {
            answer.put_valid(field, FOR_EVER);
        }
    }

    /// The other way round.
    fn mean_owner(&self, asked: &mut Message, valid: u32, folder: &[u8]) {
        let Some((uid, gid)) = self.owners.get(folder).copied() else { return };
        let fields = [
            (request::VALID_UID, request::SETATTR_UID, uid, self.host.0),
            (request::VALID_GID, request::SETATTR_GID, gid, self.host.1),
        ];
        for (bit, at, guest, host) in fields {
            if valid & bit != 0 && asked.u32(at) == Some(guest) {
                asked.put_u32(at, host);
            }
        }
    }

    fn forget(&mut self, id: u64, count: u64) {
        let Some(node) = self.nodes.get_mut(&id).filter(|_| id != ROOT_ID) else { return };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups > 0 {
            return;
        }
        let (inner, held) = (node.inner, node.held);
        self.nodes.remove(&id);
        if let Some(inner) = inner {
            self.by_inner.remove(&inner);
            self.files.forget(&Context::new(), inner, held);
        }
    }

    /// `struct fuse_batch_forget_in`, then pairs of a file and a count.
    fn forget_many(&mut self, asked: &Message) {
        let count = asked.u32(request::BODY).unwrap_or_default() as usize;
        for at in (request::BODY + 8..asked.0.len()).step_by(16).take(count) {
            if let (Some(id), Some(lookups)) = (asked.u64(at), asked.u64(at + 8)) {
                self.forget(id, lookups);
            }
        }
    }

    /// What another process needs to know the same numbers.
    pub(super) fn save(&self) -> SavedNumbers {
        if let Some(saved) = &self.saved {
            return saved.clone();
        }
        let root = self.files.path_of(ROOT_ID).unwrap_or_else(|_| "/".into());
        let node = |(&id, node): (&u64, &Node)| {
            let found = node.inner.and_then(|inner| {
                let path = self.files.path_of(inner).ok()?;
                let path = path.strip_prefix(&root).ok()?;
                let (attributes, _) = self.files.getattr(&Context::new(), inner, None).ok()?;
                Some((path.as_os_str().as_bytes().to_vec(), attributes.st_ino))
            });
            let (path, inode) = found.unwrap_or_default();
            SavedNode { id, lookups: node.lookups, path, inode }
        };
        let handle = |(&id, handle): (&u64, &Handle)| SavedHandle {
            id,
            node: handle.node,
            flags: handle.flags,
            folder: handle.folder,
        };
        SavedNumbers {
            init: self.init.clone(),
            nodes: self.nodes.iter().filter(|(id, _)| **id != ROOT_ID).map(node).collect(),
            handles: self.handles.iter().map(handle).collect(),
            last_node: self.last_node,
            last_handle: self.last_handle,
        }
    }

    fn restore(&mut self, saved: SavedNumbers) {
        if saved.init.is_empty() {
            return;
        }
        self.pipe.answer(&self.server, &mut Message(saved.init.clone()));
        (self.init, self.last_node, self.last_handle) = (saved.init, saved.last_node, saved.last_handle);
        for SavedNode { id, lookups, path, inode } in saved.nodes {
            let inner = self.find(&path, inode).filter(|inner| !self.by_inner.contains_key(inner));
            if let Some(inner) = inner {
                self.by_inner.insert(inner, id);
            }
            let folder = path.split(|byte| *byte == b'/').find(|part| !part.is_empty()).unwrap_or_default();
            let held = u64::from(inner.is_some());
            self.nodes.insert(id, Node { lookups, held, ..Node::new(inner, Arc::from(folder)) });
        }
        for SavedHandle { id, node, flags, folder } in saved.handles {
            let inner = self.inner(node).and_then(|inner| self.open(inner, flags, folder));
            self.handles.insert(id, Handle { inner, node, flags, folder });
        }
    }

    /// Looks up the file at `path`, if it is the one with that inode.
    fn find(&self, path: &[u8], inode: u64) -> Option<u64> {
        let context = Context::new();
        let mut at = ROOT_ID;
        let mut found = 0;
        for part in path.split(|byte| *byte == b'/').filter(|part| !part.is_empty()) {
            let entry = CString::new(part).ok().and_then(|name| self.files.lookup(&context, at, &name).ok());
            if at != ROOT_ID {
                self.files.forget(&context, at, 1);
            }
            let entry = entry?;
            (at, found) = (entry.inode, entry.attr.st_ino);
        }
        if at == ROOT_ID {
            return None;
        }
        if found == inode {
            return Some(at);
        }
        self.files.forget(&context, at, 1);
        None
    }

    fn open(&self, inner: u64, flags: u32, folder: bool) -> Option<u64> {
        let context = Context::new();
        if folder {
            self.files.opendir(&context, inner, flags).ok()?.0
        } else {
            self.files.open(&context, inner, flags, 0).ok()?.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_of_containers_that_join_are_folders_of_their_own() {
        for (folder, is_of, tree) in [
            ("root", false, "root"),
            ("joined", true, "joined"),
            ("joined/c1", true, "joined/c1"),
            ("joined/c1/root", false, "root"),
            ("joined/c1/m1", false, "m1"),
            ("joinedx", false, "joinedx"),
        ] {
            assert_eq!(is_of_joined(folder.as_bytes()), is_of, "{folder}");
            assert_eq!(tree_of(folder.as_bytes()), tree.as_bytes(), "{folder}");
        }
    }
}
