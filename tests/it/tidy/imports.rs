//! No import circle: the files of a crate have an order in which each uses only those before it.

use std::collections::{BTreeMap, BTreeSet};

use super::files;
use super::source::{library_code, test_modules};

/// The files that each file names in `use` declarations and paths; re-exports of a module's own
/// parts do not count.
type Uses = BTreeMap<String, BTreeSet<String>>;

/// The module path of a file, as in `["ops", "route"]`.
fn module_of(folder: &str, name: &str) -> Vec<String> {
    let inside = name[folder.len() + 1..].trim_end_matches(".rs");
    let mut parts: Vec<String> = inside.split('/').map(str::to_owned).collect();
    if parts.last().is_some_and(|last| last == "mod" || last == "lib") {
        parts.pop();
    }
    parts
}

/// The paths of a use tree: `a::{b, c::d}` has `a::b` and `a::c::d`.
fn paths(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((prefix, rest)) = tree.split_once('{') else { return vec![tree.to_owned()] };
    let body = rest.rsplit_once('}').map_or(rest, |(body, _)| body);
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    for (at, c) in body.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&body[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&body[start..]);
    let parts = parts.into_iter().filter(|part| !part.trim().is_empty());
    parts.flat_map(paths).map(|path| format!("{prefix}{path}")).collect()
}

/// The `use` trees of a file, each with whether it is public.
fn use_trees(code: &str) -> Vec<(bool, String)> {
    let mut trees = Vec::new();
    for statement in code.split(';') {
        let begin = statement.rfind(['}', '{']).filter(|_| !statement.contains("use "));
        let statement = statement[begin.unwrap_or(0)..].trim();
        let Some(at) = statement.find("use ") else { continue };
        let is_word = statement[..at].chars().next_back().is_none_or(char::is_whitespace);
        if is_word {
            let public = statement[..at].trim_end().ends_with("pub")
                || statement[..at].trim_end().ends_with(')') && statement[..at].contains("pub(");
            trees.push((public, statement[at + "use ".len()..].to_owned()));
        }
    }
    trees
}

/// The uses among `sources`, the files of the crate in `folder`.
fn uses(folder: &str, sources: &[(String, String)]) -> Uses {
    let tests: BTreeSet<String> =
        sources.iter().flat_map(|(name, text)| test_modules(name, text)).collect();
    let modules: BTreeMap<Vec<String>, &str> =
        sources.iter().map(|(name, _)| (module_of(folder, name), name.as_str())).collect();
    let mut uses = Uses::new();
    for (name, text) in sources.iter().filter(|(name, _)| !tests.contains(name)) {
        let code = library_code(text);
        let own = module_of(folder, name);
        let mut named: Vec<(bool, String)> = Vec::new();
        for (public, tree) in use_trees(&code) {
            named.extend(paths(&tree).into_iter().map(|path| (public, path)));
        }
        for (at, _) in code.match_indices("crate::") {
            let path = code[at..].split(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
            named.extend(path.take(1).map(|path| (false, path.to_owned())));
        }
        for (public, path) in named {
            let mut parts: Vec<String> =
                path.split("::").map(|part| part.trim().to_owned()).collect();
            match parts[0].as_str() {
                "crate" => drop(parts.remove(0)),
                "self" => drop(parts.splice(..1, own.iter().cloned())),
                "super" => {
                    let up = parts.iter().take_while(|part| *part == "super").count();
                    parts.splice(..up, own[..own.len().saturating_sub(up)].iter().cloned());
                }
                first if modules.contains_key(&[&own[..], &[first.to_owned()]].concat()) => {
                    drop(parts.splice(..0, own.iter().cloned()));
                }
                _ => continue,
            }
            let own_part = public && parts.starts_with(&own);
            while !parts.is_empty() && !modules.contains_key(&parts) {
                parts.pop();
            }
            let target = modules.get(&parts).filter(|_| !parts.is_empty() && !own_part);
            if let Some(target) = target.filter(|target| *target != name) {
                uses.entry(name.clone()).or_default().insert((*target).to_owned());
            }
        }
    }
    uses
}

/// A circle, as the files along it.
fn circle(uses: &Uses) -> Option<Vec<String>> {
    fn visit(uses: &Uses, path: &mut Vec<String>, done: &mut BTreeSet<String>) -> bool {
        let here = path.last().cloned().unwrap();
        for next in uses.get(&here).into_iter().flatten() {
            if let Some(at) = path.iter().position(|file| file == next) {
                path.drain(..at);
                return true;
            }
            if !done.contains(next) {
                path.push(next.clone());
                if visit(uses, path, done) {
                    return true;
                }
            }
        }
        done.insert(here);
        path.pop();
        false
    }
    let mut done = BTreeSet::new();
    uses.keys().find_map(|file| {
        let mut path = vec![file.clone()];
        (!done.contains(file) && visit(uses, &mut path, &mut done)).then_some(path)
    })
}

#[test]
fn files_import_no_circle() {
    for folder in ["src", "hf/src", "benches"] {
        let sources = files(folder, &[".rs"]);
        let uses = uses(folder, &sources);
        assert!(uses.values().map(BTreeSet::len).sum::<usize>() > 10, "{folder}: {uses:?}");
        assert_eq!(circle(&uses), None, "{folder}");
    }
}

#[test]
fn a_circle_is_found() {
    let file = |name: &str, text: &str| (format!("src/{name}.rs"), text.to_owned());
    let circle_of = |sources: &[(String, String)]| circle(&uses("src", sources));
    let a = file("a", "use crate::{b::{X, Y}, c};\nfn f() {}");
    let nested = file("b", "use std::fmt;\npub mod inner {}\nfn f() -> crate::c::Z {}");
    let (back, tested) =
        (file("c", "use super::a::T;"), file("c", "#[cfg(test)]\nmod tests { use crate::a::T; }"));
    assert_eq!(circle_of(&[a.clone(), nested.clone(), tested]), None);
    let found = circle_of(&[a, nested, back]).unwrap();
    assert_eq!(found.len(), 3, "{found:?}");
    let (parent, child) = (file("p", "mod q;\npub use q::X;"), file("p/q", "use super::Y;"));
    assert_eq!(circle_of(&[parent, child.clone()]), None);
    assert!(circle_of(&[file("p", "mod q;\nuse q::X;"), child]).is_some());
}
