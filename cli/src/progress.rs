//! Progress on the terminal, for what takes more than two seconds and for nothing else.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What takes less is over before anybody has read a bar.
const PATIENCE: Duration = Duration::from_secs(2);

/// A bar or a spinner that appears late and goes when it is dropped. Where stderr is not a terminal it
/// never appears.
pub struct Progress {
    bar: ProgressBar,
    stop: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// Work of a known number of equal parts.
    pub fn parts(what: &str, parts: usize) -> Self {
        Self::start(what, Some(parts as u64), "{msg} {wide_bar} {pos}/{len} ({eta} left)")
    }

    /// One piece of work.
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

    /// One part more is done.
    pub fn advance(&self) {
        self.bar.inc(1);
    }

    /// What is being done now.
    pub fn say(&self, what: String) {
        self.bar.set_message(what);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.stop.take() {
            drop(stop);
            // The thread only draws: if it failed there is nothing to lose.
            let _ = thread.join();
        }
        self.bar.finish_and_clear();
    }
}

/// The steps of a run and the time of each.
#[derive(Default)]
pub struct Steps(pub Vec<(String, Duration)>);

impl Steps {
    /// How long the step of this name took.
    pub fn of(&self, what: &str) -> Duration {
        self.0.iter().filter(|(step, _)| step == what).map(|(_, duration)| *duration).sum()
    }

    /// Does one step, with a spinner if it is long.
    pub fn time<T>(&mut self, what: &str, step: impl FnOnce() -> T) -> T {
        let _progress = Progress::one(what);
        self.measure(what, step)
    }

    /// Does one step that shows its own progress.
    pub fn measure<T>(&mut self, what: &str, step: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = step();
        self.add(what, start.elapsed());
        result
    }

    /// Notes a step that was measured elsewhere.
    pub fn add(&mut self, what: &str, duration: Duration) {
        self.0.push((what.into(), duration));
    }
}
