//! Progress on the terminal, for work that takes more than two seconds.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The time after which a bar appears.
const PATIENCE: Duration = Duration::from_secs(2);

/// A bar or a spinner that appears after two seconds and is removed when it is dropped. It is
/// hidden if stderr is no terminal.
pub struct Progress {
    bar: ProgressBar,
    stop: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// A bar, for work of a known number of parts.
    pub fn parts(what: &str, parts: usize) -> Self {
        Self::start(what, Some(parts as u64), "{msg} {wide_bar} {pos}/{len} ({eta} left)")
    }

    /// A spinner, for one piece of work.
    pub fn one(what: &str) -> Self {
        Self::start(what, None, "{spinner} {msg} {elapsed}")
    }

    fn start(what: &str, parts: Option<u64>, template: &str) -> Self {
        let bar = ProgressBar::with_draw_target(parts, ProgressDrawTarget::hidden());
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what.to_string());
        let (stop, stopped) = channel();
        let shown = bar.clone();
        let thread = std::thread::spawn(move || {
            if stopped.recv_timeout(PATIENCE) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            shown.set_draw_target(ProgressDrawTarget::stderr());
            while stopped.recv_timeout(Duration::from_millis(100)) == Err(RecvTimeoutError::Timeout)
            {
                shown.tick();
            }
        });
        Self { bar, stop: Some((stop, thread)) }
    }

    /// Counts one finished part.
    pub fn advance(&self) {
        self.bar.inc(1);
    }

    /// Sets the text beside the bar.
    pub fn set_message(&self, what: String) {
        self.bar.set_message(what);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.stop.take() {
            drop(stop);
            // The thread only draws, so that its failure is ignored.
            let _ = thread.join();
        }
        self.bar.finish_and_clear();
    }
}

/// The steps of a command and the time of each.
#[derive(Default)]
pub struct Steps(pub Vec<(String, Duration)>);

impl Steps {
    /// The time of all steps of this name.
    pub fn of(&self, what: &str) -> Duration {
        self.0.iter().filter(|(step, _)| step == what).map(|(_, duration)| *duration).sum()
    }

    /// Runs a step with a spinner.
    pub fn time<T>(&mut self, what: &str, step: impl FnOnce() -> T) -> T {
        let _progress = Progress::one(what);
        self.measure(what, step)
    }

    /// Runs a step that shows its own progress.
    pub fn measure<T>(&mut self, what: &str, step: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = step();
        self.add(what, start.elapsed());
        result
    }

    /// Adds a step that was timed by the caller.
    pub fn add(&mut self, what: &str, duration: Duration) {
        self.0.push((what.into(), duration));
    }
}
