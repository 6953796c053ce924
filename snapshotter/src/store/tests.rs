//! The store against a plain map.

use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Op {
    Create(Kind, u8, Option<u8>),
    /// Creation whose directory cannot be made.
    Fail(u8),
    Commit(u8, u8),
    Remove(u8),
    Reopen,
}

fn op() -> impl Strategy<Value = Op> {
    let kind = prop_oneof![Just(Kind::Active), Just(Kind::View), Just(Kind::Committed)];
    prop_oneof![
        4 => (kind, 0u8..6, prop::option::of(0u8..6)).prop_map(|(k, n, p)| Op::Create(k, n, p)),
        1 => (0u8..6).prop_map(Op::Fail),
        3 => (0u8..6, 0u8..6).prop_map(|(n, k)| Op::Commit(n, k)),
        2 => (0u8..6).prop_map(Op::Remove),
        1 => Just(Op::Reopen),
    ]
}

/// Name to kind and parent.
type Model = BTreeMap<String, (Kind, Option<String>)>;

fn create(model: &mut Model, kind: Kind, name: &str, parent: Option<&str>) -> bool {
    let parent_fits =
        parent.is_none_or(|p| model.get(p).is_some_and(|(k, _)| *k == Kind::Committed));
    if !parent_fits || model.contains_key(name) {
        return false;
    }
    model.insert(name.to_owned(), (kind, parent.map(str::to_owned)));
    true
}

fn commit(model: &mut Model, name: &str, key: &str) -> bool {
    if model.contains_key(name) || model.get(key).is_none_or(|(kind, _)| *kind != Kind::Active) {
        return false;
    }
    let (_, parent) = model.remove(key).unwrap();
    model.insert(name.to_owned(), (Kind::Committed, parent));
    true
}

fn remove(model: &mut Model, name: &str) -> bool {
    let has_children = model
        .values()
        .any(|(_, parent)| parent.as_deref() == Some(name));
    !has_children && model.remove(name).is_some()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever happens, also across restarts, the store agrees with a plain map,
    /// and no id is ever used for two snapshots.
    #[test]
    fn agrees_with_a_map(ops in prop::collection::vec(op(), 1..24)) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("db");
        let mut store = Store::open(&path).unwrap();
        let mut model = Model::new();
        let mut ids = HashMap::new();
        for op in ops {
            match op {
                Op::Create(kind, name, parent) => {
                    let (name, parent) = (name.to_string(), parent.map(|p| p.to_string()));
                    let new = New { kind, name: &name, parent: parent.as_deref(), labels: Labels::new() };
                    let done = store.create(new, |_, _| Ok(()));
                    prop_assert_eq!(done.is_ok(), create(&mut model, kind, &name, parent.as_deref()));
                    if let Ok(records) = done {
                        prop_assert!(ids.insert(records[0].id, ()).is_none());
                    }
                }
                Op::Fail(name) => {
                    let name = name.to_string();
                    let new = New { kind: Kind::Active, name: &name, parent: None, labels: Labels::new() };
                    let failed = store.create(new, |_, _| Err(Error::Invalid(String::new())));
                    prop_assert!(failed.is_err());
                }
                Op::Commit(name, key) => {
                    let (name, key) = (name.to_string(), key.to_string());
                    let done = store.commit(&name, &key, Labels::new(), Usage::default());
                    prop_assert_eq!(done.is_ok(), commit(&mut model, &name, &key));
                }
                Op::Remove(name) => {
                    let name = name.to_string();
                    prop_assert_eq!(store.remove(&name).is_ok(), remove(&mut model, &name));
                }
                Op::Reopen => {
                    drop(store);
                    store = Store::open(&path).unwrap();
                }
            }
            let found: Model = store.all().unwrap().into_iter()
                .map(|record| (record.name, (record.kind, record.parent))).collect();
            prop_assert_eq!(&found, &model);
        }
    }
}

#[test]
fn two_processes_cannot_share_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("db");
    let _store = Store::open(&path).unwrap();
    let error = Store::open(&path).unwrap_err().to_string();
    assert!(error.contains("open"), "{error}");
}

#[test]
fn something_else_is_not_a_store() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("db");
    std::fs::write(&path, "not a database").unwrap();
    assert!(Store::open(&path).is_err());
}

#[test]
fn a_replacement_is_kept_until_it_is_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("db");
    let replacement = Replacement {
        program: "/opt/next".into(),
        instead_of: "/usr/bin/nydusd".into(),
    };
    let store = Store::open(&path).unwrap();
    assert_eq!(store.replacement().unwrap(), None);
    store.set_replacement(Some(&replacement)).unwrap();
    drop(store);
    let store = Store::open(&path).unwrap();
    assert_eq!(store.replacement().unwrap(), Some(replacement));
    store.set_replacement(None).unwrap();
    assert_eq!(store.replacement().unwrap(), None);
}
