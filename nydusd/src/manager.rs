//! The images of this daemon: mounted, replaced and unmounted while it runs.
//!
//! One change happens at a time; requests of the kernel are not kept waiting by one
//! (see [`vfs`](crate::vfs)). After a change the kernel is told to forget what it
//! knows about the path. Before it, what a successor of this process needs is left with
//! the keeper ([`saved`]); [`Manager::recover`] is that successor's side.
//!
//! An image that has a mount of its own is here, too, so that it can be asked about.

pub(crate) mod saved;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use anyhow::Context as _;
use fuse_backend_rs::abi::fuse_abi::ROOT_ID;
use serde_json::Value;
use storage::blob::Blob;
use storage::metrics::Metrics;

use crate::fuse::node::Slot;
use crate::fuse::notify;
use crate::fuse::session::Session;
use crate::fuse::teach::teach;
use crate::keeper::{Deposit, Holder as Keeper};
use crate::metered::Metered;
use crate::mounts::{self, Opened, Source};
use crate::shared::Shared;
use crate::vfs::pseudo::Pseudo;
use crate::vfs::{Mounted, Table, Vfs};
use saved::{Left, Origin, SavedImage, SavedTable};

/// What is known about an image beside its files.
#[derive(Clone, Debug, Default)]
pub(crate) struct About {
    /// Name in the configuration; may be empty.
    pub id: String,
    /// Kind of back end, as configurations name it.
    pub backend_kind: String,
    /// The configuration in version 2, without secrets; `null` for an image that was
    /// mounted without one.
    pub config: Value,
    /// The image as the user named it.
    pub image: String,
    /// The measured back end.
    pub backend: Option<Arc<Metered>>,
    /// The counters of its cache.
    pub cache: Arc<Metrics>,
    /// Directory of its cache.
    pub cache_dir: PathBuf,
    /// When it was mounted.
    pub mounted: Option<SystemTime>,
    /// Whether it has a mount of its own, and is not in the daemon's FUSE mount.
    pub own_mount: bool,
}

/// Why a change was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ManageError {
    /// The path is in use.
    #[error("object or filesystem already exists")]
    Exists,
    /// Nothing is mounted on the path.
    #[error("object or filesystem doesn't exist")]
    Absent,
    /// The path cannot be mounted on.
    #[error("`{path}`: {reason}")]
    Path {
        /// The path.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// It is not ours to change.
    #[error("this image is the whole mount: it cannot be changed, only be unmounted")]
    WholeMount,
    /// The image cannot be opened, or the daemon is full.
    #[error("{0:#}")]
    Other(#[from] anyhow::Error),
}

/// Settings that were made at run time, by scope.
type Scopes = BTreeMap<String, BTreeMap<String, String>>;

/// The images of this daemon.
#[derive(Debug, Default)]
pub(crate) struct Manager {
    vfs: Arc<Vfs>,
    session: OnceLock<Arc<Session>>,
    /// Whether the kernel has learned that files are closed without us.
    taught: AtomicBool,
    /// Held while something changes.
    changing: Mutex<()>,
    scopes: Mutex<Scopes>,
    /// Who holds what a successor needs; nobody in tests.
    keeper: Option<Arc<Keeper>>,
    /// Memory and servers of all images.
    shared: Shared,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Manager {
    /// No images yet.
    ///
    /// * `shared`: what all of them will share.
    pub(crate) fn new(keeper: Arc<Keeper>, shared: Shared) -> Self {
        Self {
            keeper: Some(keeper),
            shared,
            ..Self::default()
        }
    }

    /// Of a daemon that mounts nothing yet: what it is told is left with nobody.
    ///
    /// * `shared`: what images will share.
    pub(crate) fn idle(shared: Shared) -> Self {
        Self {
            shared,
            ..Self::default()
        }
    }

    /// What all images of the process share.
    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The file system that serves the images.
    pub(crate) fn vfs(&self) -> &Arc<Vfs> {
        &self.vfs
    }

    /// From now on the kernel of this session is told of changes.
    pub(crate) fn attach(&self, session: &Arc<Session>) {
        // Called once, by whoever mounts.
        let _ = self.session.set(Arc::clone(session));
    }

    /// Mounts an image on an absolute path inside the mount.
    ///
    /// # Errors
    /// The path is taken or hidden, or the image cannot be opened.
    pub(crate) fn mount(
        &self,
        path: &str,
        source: &Source,
        origin: &Origin,
    ) -> Result<(), ManageError> {
        let _one = locked(&self.changing);
        let path = self.free_path(path)?;
        let opened = mounts::open(source, &self.shared).map_err(ManageError::Other)?;
        self.put(&path, source, opened, origin)
    }

    /// The one spelling of a path on which an image can be mounted.
    ///
    /// # Errors
    /// It is taken or hidden, or no path.
    pub(crate) fn free_path(&self, path: &str) -> Result<String, ManageError> {
        let path = normal(path)?;
        let table = self.vfs.table();
        if table.image_at(&path).is_some() {
            return Err(ManageError::Exists);
        }
        for other in table.images() {
            if is_below(&path, &other.path) || is_below(&other.path, &path) {
                return Err(ManageError::Path {
                    path,
                    reason: "an image is mounted above or below it",
                });
            }
        }
        Ok(path)
    }

    /// Mounts the image that the command line names on `/`.
    ///
    /// # Errors
    /// It cannot be left with the keeper.
    pub(crate) fn begin(&self, source: &Source, opened: Opened) -> Result<(), ManageError> {
        let _one = locked(&self.changing);
        self.put("/", source, opened, &Origin::CommandLine)
    }

    /// An image that gets a mount of its own, before that is made.
    ///
    /// * `path`: where it is below the daemon's mount point.
    ///
    /// # Errors
    /// There are too many images.
    pub(crate) fn prepare(
        &self,
        path: &str,
        source: &Source,
        opened: Opened,
    ) -> Result<Arc<Mounted>, ManageError> {
        let (_, generation) = free_slot(&self.vfs.table(), path)?;
        // Node numbers of such a mount are its own, and the same in every process.
        let mut mounted = mounted(path, source, opened, Slot::FIRST, generation)?;
        mounted.stamp = 0;
        mounted.about.own_mount = true;
        self.apply_scope(&mounted);
        Ok(Arc::new(mounted))
    }

    /// Takes in an image of [`Manager::prepare`], in the place of the one on its path.
    ///
    /// # Errors
    /// There are too many images.
    pub(crate) fn note(&self, image: &Arc<Mounted>) -> Result<(), ManageError> {
        let _one = locked(&self.changing);
        let mut table = self.vfs.table().as_ref().clone();
        let (slot, _) = free_slot(&table, &image.path)?;
        table
            .put(slot, Arc::clone(image))
            .map_err(|full| ManageError::Other(full.into()))?;
        self.vfs.set_table(table);
        Ok(())
    }

    /// The generation of the image on a path.
    pub(crate) fn generation_at(&self, path: &str) -> Option<u64> {
        let table = self.vfs.table();
        table.image_at(path).map(|image| image.generation)
    }

    /// Forgets an image whose mount has ended.
    pub(crate) fn drop_note(&self, generation: u64) {
        let _one = locked(&self.changing);
        let mut table = self.vfs.table().as_ref().clone();
        let is_it = |image: &&Arc<Mounted>| image.generation == generation;
        let path = table.images().find(is_it).map(|image| image.path.clone());
        if let Some(path) = path {
            table.remove(&path);
            self.vfs.set_table(table);
        }
    }

    /// Replaces the image on a path. Files that are open stay those of the old image
    /// until its blobs' resident data ends.
    ///
    /// # Errors
    /// Nothing is mounted there, or the new image cannot be opened; the old one stays.
    pub(crate) fn remount(
        &self,
        path: &str,
        source: &Source,
        origin: &Origin,
    ) -> Result<(), ManageError> {
        let path = normal(path)?;
        let _one = locked(&self.changing);
        let table = self.vfs.table();
        let old = table.image_at(&path).ok_or(ManageError::Absent)?;
        if old.about.own_mount {
            return Err(ManageError::WholeMount);
        }
        let mut forgotten = root_names(old);
        let opened = mounts::open(source, &self.shared).map_err(ManageError::Other)?;
        self.put(&path, source, opened, origin)?;
        if path == "/" {
            if let Some(new) = self.vfs.table().image_at(&path) {
                forgotten.extend(root_names(new));
            }
            self.forget_below_root(&forgotten);
        }
        self.end(old);
        Ok(())
    }

    /// Takes an image away. Programs that use it see errors from now on.
    ///
    /// # Errors
    /// Nothing is mounted there.
    pub(crate) fn unmount(&self, path: &str) -> Result<(), ManageError> {
        let path = normal(path)?;
        let _one = locked(&self.changing);
        let mut table = self.vfs.table().as_ref().clone();
        let old = table.remove(&path).ok_or(ManageError::Absent)?;
        if old.about.own_mount {
            return Err(ManageError::WholeMount);
        }
        self.save(&table).map_err(ManageError::Other)?;
        self.vfs.set_table(table);
        if path == "/" {
            self.forget_below_root(&root_names(&old));
        } else {
            self.forget(&path);
        }
        self.end(&old);
        tracing::info!("{path}: unmounted {}", old.about.image);
        Ok(())
    }

    fn put(
        &self,
        path: &str,
        source: &Source,
        opened: Opened,
        origin: &Origin,
    ) -> Result<(), ManageError> {
        let mut table = self.vfs.table().as_ref().clone();
        let (slot, generation) = free_slot(&table, path)?;
        let mounted = mounted(path, source, opened, slot, generation)?;
        self.apply_scope(&mounted);
        table
            .put(slot, mounted)
            .map_err(|full| ManageError::Other(full.into()))?;
        if let Some(keeper) = &self.keeper {
            let mut saved = SavedImage::new(path, slot.get(), generation, &source.name);
            saved.bootstrap.clone_from(&source.bootstrap);
            let deposited = saved.deposit(keeper, origin);
            deposited
                .and_then(|()| self.save(&table))
                .inspect_err(|_| keeper.withdraw(&saved::name(generation)))
                .map_err(ManageError::Other)?;
        }
        self.vfs.set_table(table);
        self.forget(path);
        if path != "/" {
            tracing::info!("{path}: mounted {}", source.name);
        }
        if let Some(image) = self.vfs.table().image_at(path) {
            self.teach(image);
        }
        Ok(())
    }

    /// Has the kernel learn by a file of this image that closing files need not be
    /// answered, unless it knows, or nothing is mounted yet.
    pub(crate) fn teach(&self, image: &Mounted) {
        if let Some(session) = self.session.get()
            && !self.taught.load(Ordering::Relaxed)
        {
            let root = session
                .mountpoint()
                .join(image.path.trim_start_matches('/'));
            let taught = teach(&root, image.files.image());
            self.taught.store(taught, Ordering::Relaxed);
        }
    }

    /// Leaves the table with the keeper: from now on it is what counts.
    fn save(&self, table: &Table) -> anyhow::Result<()> {
        let Some(keeper) = &self.keeper else {
            return Ok(());
        };
        let ours = table.images().filter(|image| !image.about.own_mount);
        let saved = SavedTable::new(
            ours.map(|image| image.generation).collect(),
            table.counters(),
            table.pseudo.saved(),
            locked(&self.scopes).clone(),
        );
        saved.deposit(keeper)
    }

    /// Ends what an image that is gone still does: nobody waits for it any more.
    fn end(&self, image: &Mounted) {
        if let Some(keeper) = &self.keeper {
            keeper.withdraw(&saved::name(image.generation));
        }
        let blobs = image.files.blobs();
        blobs.iter().for_each(|blob| Blob::close(blob));
    }

    /// Ends everything: the mount is gone.
    pub(crate) fn close(&self) {
        let Some(keeper) = &self.keeper else {
            return;
        };
        keeper.withdraw(saved::TABLE);
        for image in self.vfs.table().images() {
            keeper.withdraw(&saved::name(image.generation));
        }
    }

    /// Goes on with the images of a predecessor. One that cannot be opened any more is
    /// left out, unless it is the whole mount.
    ///
    /// * `left`: the deposits of this module;
    /// * `taken_over`: they came by way of a supervisor, who may not know of the latest
    ///   changes;
    /// * `source`: finds the parts of an image, given how it came and its bootstrap.
    ///
    /// # Errors
    /// When the state cannot be understood, or the image on `/` not be opened.
    pub(crate) fn recover(
        &self,
        left: Vec<(String, Deposit)>,
        taken_over: bool,
        source: &dyn Fn(&Origin, PathBuf) -> anyhow::Result<Source>,
    ) -> anyhow::Result<()> {
        let _one = locked(&self.changing);
        let Some((_, table)) = left.iter().find(|(name, _)| name == saved::TABLE) else {
            return Ok(());
        };
        let saved = SavedTable::parse(table)?;
        let mut table = Table::default();
        table.pseudo = Pseudo::restore(&saved.directories)?;
        *locked(&self.scopes) = saved.scopes;
        for (name, deposit) in left {
            if name == saved::TABLE {
                continue;
            }
            let left = Left::parse(deposit)?;
            if !saved.images.contains(&left.saved.generation) {
                // A change that did not come to its end.
                if let Some(keeper) = &self.keeper {
                    keeper.withdraw(&name);
                }
                continue;
            }
            let path = left.saved.path.clone();
            match self.reopen(left, source) {
                Ok((slot, mounted)) => table.put(slot, mounted)?,
                Err(error) if path != "/" => {
                    tracing::error!("{path} cannot be served any more: {error:#}");
                }
                Err(error) => return Err(error.context(format!("cannot go on serving {path}"))),
            }
        }
        table.set_counters(saved.counters);
        if taken_over {
            table.skip();
            self.save(&table)?;
        }
        self.vfs.set_table(table);
        Ok(())
    }

    fn reopen(
        &self,
        left: Left,
        source: &dyn Fn(&Origin, PathBuf) -> anyhow::Result<Source>,
    ) -> anyhow::Result<(Slot, Mounted)> {
        let saved = left.saved;
        let slot = Slot::new(saved.slot).context("slot 0 belongs to no image")?;
        let mut source = source(&left.origin, saved.bootstrap)?;
        // The very file, whatever is in its place by now.
        source.bootstrap = format!("/proc/self/fd/{}", left.bootstrap.as_raw_fd()).into();
        source.name.clone_from(&saved.image);
        // The list began with a predecessor, and would begin anew.
        source.record = None;
        let opened = mounts::open(&source, &self.shared)?;
        let mounted = mounted(&saved.path, &source, opened, slot, saved.generation)?;
        self.apply_scope(&mounted);
        Ok((slot, mounted))
    }

    /// Makes the kernel ask again about all paths: a predecessor may have died before
    /// it came to say so. Requests must be answered meanwhile.
    pub(crate) fn forget_all(&self) {
        for image in self.vfs.table().images() {
            self.forget(&image.path);
        }
    }

    /// Makes the kernel ask again what is on a path, and on the way to it.
    fn forget(&self, path: &str) {
        let Some(session) = self.session.get() else {
            return;
        };
        let table = self.vfs.table();
        let mut at = String::new();
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let parent = table.pseudo.walk(&at).0.unwrap_or(ROOT_ID);
            notify::forget_name(session.device(), parent, name.as_bytes());
            notify::forget_content(session.device(), parent);
            at.push('/');
            at.push_str(name);
        }
    }

    /// The same for an image on `/`, whose root is the mount's own.
    fn forget_below_root(&self, names: &[Vec<u8>]) {
        let Some(session) = self.session.get() else {
            return;
        };
        notify::forget_content(session.device(), ROOT_ID);
        for name in names {
            notify::forget_name(session.device(), ROOT_ID, name);
        }
    }

    /// Settings made at run time: of one scope, or of all with `scope:key` as keys.
    pub(crate) fn settings(&self, scope: Option<&str>) -> BTreeMap<String, String> {
        let scopes = locked(&self.scopes);
        match scope {
            Some(scope) => scopes.get(scope).map(shown).unwrap_or_default(),
            None => scopes
                .iter()
                .flat_map(|(scope, settings)| {
                    let named = move |(key, value)| (format!("{scope}:{key}"), value);
                    shown(settings).into_iter().map(named)
                })
                .collect(),
        }
    }

    /// Changes settings of a scope: `registry_auth` (the base64 form of
    /// `user:password`), `proxy_url`, `dragonfly_scheduler_endpoint`. Credentials are
    /// used from the next request of the image mounted on that path, now or later.
    ///
    /// # Errors
    /// A key is unknown or the credentials cannot be used; nothing is changed then.
    pub(crate) fn set(&self, scope: &str, new: &BTreeMap<String, String>) -> anyhow::Result<()> {
        for (key, value) in new {
            match key.as_str() {
                "registry_auth" => {
                    login(value)?;
                }
                "proxy_url" | "dragonfly_scheduler_endpoint" => {}
                other => anyhow::bail!("unknown key `{other}`"),
            }
        }
        let _one = locked(&self.changing);
        if let Some(auth) = new.get("registry_auth")
            && let Some(image) = self.vfs.table().image_at(scope)
        {
            renew(image, auth)?;
        }
        for key in new.keys().filter(|key| *key != "registry_auth") {
            tracing::warn!("setting `{key}` of {scope} has no effect while images are mounted");
        }
        locked(&self.scopes)
            .entry(scope.to_owned())
            .or_default()
            .extend(new.clone());
        self.save(&self.vfs.table())
    }

    /// Gives a new image the credentials that were set for its path before.
    fn apply_scope(&self, image: &Mounted) {
        let auth = locked(&self.scopes)
            .get(&image.path)
            .and_then(|settings| settings.get("registry_auth").cloned());
        if let Some(auth) = auth
            && let Err(err) = renew(image, &auth)
        {
            tracing::warn!("{}: {err:#}", image.path);
        }
    }
}

/// Settings without secrets.
fn shown(settings: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut settings = settings.clone();
    if let Some(auth) = settings.get_mut("registry_auth") {
        *auth = "(set)".to_owned();
    }
    settings
}

/// User and password from their base64 form.
fn login(auth: &str) -> anyhow::Result<(String, String)> {
    match crate::config::Login::from_auth(auth) {
        Ok(crate::config::Login::Basic { user, password }) => Ok((user, password)),
        _ => anyhow::bail!("`registry_auth` must be the base64 form of `user:password`"),
    }
}

fn renew(image: &Mounted, auth: &str) -> anyhow::Result<()> {
    let (user, password) = login(auth)?;
    let backend = image.about.backend.as_ref().context("no back end")?;
    storage::backend::Backend::renew_login(backend.as_ref(), &user, &password)
        .with_context(|| format!("{}: new credentials", image.path))?;
    tracing::info!("{}: credentials replaced", image.path);
    Ok(())
}

/// An image in its place.
fn mounted(
    path: &str,
    source: &Source,
    opened: Opened,
    slot: Slot,
    generation: u64,
) -> Result<Mounted, ManageError> {
    let (files, about) = opened
        .into_files(source, slot)
        .map_err(ManageError::Other)?;
    Ok(Mounted {
        path: path.to_owned(),
        files,
        generation,
        stamp: generation,
        stats: Default::default(),
        about,
    })
}

fn free_slot(table: &Table, path: &str) -> Result<(Slot, u64), ManageError> {
    table.free_slot().ok_or(ManageError::Path {
        path: path.to_owned(),
        reason: "255 images are mounted, there is no room for another one",
    })
}

fn root_names(image: &Mounted) -> Vec<Vec<u8>> {
    let mut names = Vec::new();
    let of = image.files.image();
    // A damaged directory has no names that the kernel could have learnt.
    let _ = of.readdir(of.root(), 0, |entry| {
        names.push(entry.name.to_vec());
        ControlFlow::Continue(())
    });
    names
}

fn is_below(path: &str, parent: &str) -> bool {
    parent == "/"
        || path
            .strip_prefix(parent)
            .is_some_and(|rest| rest.starts_with('/'))
}

/// The path without empty names and a slash at its end.
///
/// # Errors
/// When nothing can be mounted on it.
pub(crate) fn normal(path: &str) -> Result<String, ManageError> {
    let bad = |reason| ManageError::Path {
        path: path.to_owned(),
        reason,
    };
    if !path.starts_with('/') {
        return Err(bad("a mount point is an absolute path"));
    }
    if path.len() > 4096 {
        return Err(bad("longer than 4096 bytes"));
    }
    let mut normal = String::new();
    for name in path.split('/').filter(|name| !name.is_empty()) {
        if name == "." || name == ".." || name.contains('\0') {
            return Err(bad("`.`, `..` and zero bytes are no names of directories"));
        }
        if name.len() > 255 {
            return Err(bad("a name is longer than 255 bytes"));
        }
        normal.push('/');
        normal.push_str(name);
    }
    if normal.is_empty() {
        normal.push('/');
    }
    Ok(normal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_absolute_and_have_one_spelling() {
        assert_eq!(normal("/a//b/").unwrap(), "/a/b");
        assert_eq!(normal("//").unwrap(), "/");
        for path in ["", "a", "/a/../b", "/./a"] {
            assert!(normal(path).is_err(), "{path}");
        }
        assert!(is_below("/a/b", "/a") && is_below("/a", "/"));
        assert!(!is_below("/ab", "/a") && !is_below("/a", "/a"));
    }

    #[test]
    fn settings_hide_secrets_and_refuse_unknown_keys() {
        let manager = Manager::default();
        let map = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
        manager.set("/1", &map("registry_auth", "dTpw")).unwrap();
        manager.set("/1", &map("registry_auth", "%%%")).unwrap_err();
        manager.set("/1", &map("nonsense", "x")).unwrap_err();
        let all = manager.settings(None);
        assert_eq!(all, map("/1:registry_auth", "(set)"));
        assert_eq!(manager.settings(Some("/2")), BTreeMap::new());
    }
}
