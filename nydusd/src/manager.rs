//! The images of this daemon: mounted, replaced and unmounted while it runs.
//!
//! One change happens at a time; requests of the kernel are not kept waiting by one
//! (see [`vfs`](crate::vfs)). After a change the kernel is told to forget what it
//! knows about the path.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use anyhow::Context as _;
use fuse_backend_rs::abi::fuse_abi::ROOT_ID;
use serde_json::Value;
use storage::blob::Blob;
use storage::metrics::Metrics;

use crate::fuse::notify;
use crate::fuse::session::Session;
use crate::metered::Metered;
use crate::mounts::{self, Source};
use crate::vfs::{Mounted, Vfs};

/// What is known about an image beside its files.
#[derive(Debug, Default)]
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
    /// The image cannot be opened, or the daemon is full.
    #[error("{0:#}")]
    Other(anyhow::Error),
}

/// Settings that were made at run time, by scope.
type Scopes = BTreeMap<String, BTreeMap<String, String>>;

/// The images of this daemon.
#[derive(Debug, Default)]
pub(crate) struct Manager {
    vfs: Arc<Vfs>,
    session: OnceLock<Arc<Session>>,
    /// Held while something changes.
    changing: Mutex<()>,
    scopes: Mutex<Scopes>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Manager {
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
    pub(crate) fn mount(&self, path: &str, source: Source) -> Result<(), ManageError> {
        let path = normal(path)?;
        let _one = locked(&self.changing);
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
        self.put(&path, source)
    }

    /// Replaces the image on a path. Files that are open stay those of the old image
    /// until its blobs' resident data ends.
    ///
    /// # Errors
    /// Nothing is mounted there, or the new image cannot be opened; the old one stays.
    pub(crate) fn remount(&self, path: &str, source: Source) -> Result<(), ManageError> {
        let path = normal(path)?;
        let _one = locked(&self.changing);
        let table = self.vfs.table();
        let old = table.image_at(&path).ok_or(ManageError::Absent)?;
        let mut forgotten = root_names(old);
        self.put(&path, source)?;
        if path == "/" {
            if let Some(new) = self.vfs.table().image_at(&path) {
                forgotten.extend(root_names(new));
            }
            self.forget_below_root(&forgotten);
        }
        end(old);
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
        self.vfs.set_table(table);
        if path == "/" {
            self.forget_below_root(&root_names(&old));
        } else {
            self.forget(&path);
        }
        end(&old);
        tracing::info!("{path}: unmounted {}", old.about.image);
        Ok(())
    }

    fn put(&self, path: &str, source: Source) -> Result<(), ManageError> {
        let mut table = self.vfs.table().as_ref().clone();
        let (slot, generation) = table.free_slot().ok_or(ManageError::Path {
            path: path.to_owned(),
            reason: "255 images are mounted, there is no room for another one",
        })?;
        let image = source.name.clone();
        let (files, about) = mounts::open(source, slot).map_err(ManageError::Other)?;
        let mounted = Mounted {
            path: path.to_owned(),
            files,
            generation,
            stats: Default::default(),
            about,
        };
        table
            .put(slot, mounted)
            .map_err(|full| ManageError::Other(full.into()))?;
        if let Some(mounted) = table.image_at(path) {
            self.apply_scope(mounted);
        }
        self.vfs.set_table(table);
        self.forget(path);
        if path != "/" {
            tracing::info!("{path}: mounted {image}");
        }
        Ok(())
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
        Ok(())
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

/// Ends what an image that is gone still does: nobody waits for it any more.
fn end(image: &Mounted) {
    image
        .files
        .blobs()
        .iter()
        .for_each(|blob| Blob::close(blob));
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
fn normal(path: &str) -> Result<String, ManageError> {
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
