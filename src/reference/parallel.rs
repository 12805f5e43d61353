//! Parallel loops. Rayon's code for a loop takes some kilobytes for each closure, and the reference
//! has a closure for each combination of types. Passing closures to rayon as trait objects compiles
//! that code once.

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::error::Result;

/// Calls `work` for each item, in any order and on any thread.
///
/// # Errors
/// One of those of `work`; other items may be skipped after an error.
pub(super) fn for_each<T: Send>(
    items: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> Result<()> + Sync,
) -> Result<()> {
    let items: Vec<_> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    for_each_index(items.len(), &|index| {
        let item = items[index].lock().unwrap_or_else(PoisonError::into_inner).take();
        item.map_or(Ok(()), &work)
    })
}

fn for_each_index(count: usize, work: &(dyn Fn(usize) -> Result<()> + Sync)) -> Result<()> {
    (0..count).into_par_iter().try_for_each(work)
}

/// A pool of scratch memory for tasks, with one piece for each task that runs at the same time.
pub(super) struct Scratch<S>(Mutex<Vec<S>>);

impl<S: Default> Scratch<S> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// Calls `work` with a piece, whose contents are those of an earlier task.
    pub(super) fn with<R>(&self, work: impl FnOnce(&mut S) -> R) -> R {
        let pieces = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut piece = pieces().pop().unwrap_or_default();
        let result = work(&mut piece);
        pieces().push(piece);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn each_item_is_visited_once() {
        let mut squares = vec![0; 1000];
        for_each(squares.iter_mut().enumerate(), |(i, square)| {
            *square += i * i;
            Ok(())
        })
        .unwrap();
        assert!(squares.iter().enumerate().all(|(i, &square)| square == i * i));
    }

    #[test]
    fn an_error_is_returned() {
        let failed = for_each(0..100, |i| match i {
            57 => Err(Error::Mismatch { op: "test", why: i.to_string() }),
            _ => Ok(()),
        });
        assert!(matches!(failed, Err(Error::Mismatch { why, .. }) if why == "57"));
    }

    #[test]
    fn scratch_is_reused() {
        let scratch = Scratch::<Vec<u8>>::new();
        scratch.with(|piece| piece.push(1));
        scratch.with(|piece| assert_eq!(piece[..], [1]));
        scratch.with(|_| scratch.with(|other| assert!(other.is_empty())));
    }
}
