//! The program that every model family has: learn a text from scratch and sample from what was learnt, or continue a
//! prompt with a checkpoint.

use super::cli::{Outcome, Place};
use super::curve::Curve;
use super::dna;
use super::form::{parse_form, set_form};
use super::run::{Limit, Progress, Settings, Training};
use super::sample::{self, Sampling};
use super::text::Text;
use super::tokenizer::Tokenizer;
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use std::f64::consts::LN_2;
use std::path::PathBuf;
use std::time::Instant;
use subquadratic::models::{Form, LanguageModel, ModelConfig};
use subquadratic::train::{Batch, Order, StepReport, TextBatches, Trainer, TrainerConfig};

/// Without `--model`, learns a text from scratch; with it, continues `--prompt`.
#[derive(Parser, Debug)]
#[command(allow_negative_numbers = true)]
pub struct Arguments {
    /// A directory with a checkpoint of any supported family, or a run's folder: generate from it
    #[arg(long, value_name = "DIR", requires = "prompt", conflicts_with = "Training")]
    model: Option<PathBuf>,
    /// The text to continue [default: "And ", after training]
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Train a hybrid of these blocks, as in "mamba*3 attention", one after another
    #[arg(long, value_name = "WORDS", conflicts_with = "model")]
    pattern: Option<String>,
    /// Among equal forms of the mixer, the one to compute [auto, parallel, chunkwise, recurrent]
    #[arg(long, default_value = "auto", value_parser = parse_form)]
    form: Form,
    /// Seed of initialisation and sampling
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where and in what to compute.
    #[command(flatten)]
    pub place: Place,
    #[command(flatten)]
    sampling: Sampling,
    /// What and how to train.
    #[command(flatten)]
    pub training: Training,
}

/// What makes the program of one family.
pub struct Family {
    /// The program's name.
    pub name: &'static str,
    /// Width, number of blocks and vocabulary to a model.
    pub config: fn(usize, usize, usize) -> ModelConfig,
    /// Whether the state at the end of a batch is where the next one goes on; else every row begins afresh.
    pub carry: bool,
    /// What to train when nothing is said.
    pub defaults: Settings,
}

/// Runs the program of `family`.
pub fn run(family: &Family, arguments: &Arguments) -> Outcome<()> {
    arguments.sampling.check()?;
    if arguments.prompt.as_deref() == Some("") {
        return Err("--prompt: expected at least one character".into());
    }
    if let (Some(model), Some(prompt)) = (&arguments.model, &arguments.prompt) {
        let (seed, form) = (arguments.seed, arguments.form);
        return sample::from_checkpoint(model, prompt, seed, form, &arguments.sampling, arguments.place);
    }
    let limit = arguments.training.limit()?;
    let mut session = Session::open(family, arguments)?;
    let gzip = session.text.gzip_bits_per_byte()?;
    session.train(limit, gzip)?;
    let loss = session.validate(None)?;
    session.save(gzip)?;

    let folder = session.folder.display();
    let bytes = session.text.validation().len();
    println!("validation loss: {loss:.3} bits per byte (gzip -9 on the same {bytes} bytes: {gzip:.3})");
    println!("speed:           {}", session.speed());
    println!("loss curve:      {}", session.curve_path().display());
    println!("checkpoint:      {folder} (train on: --resume --out {folder} --minutes M)");
    println!("sample:\n");
    let dna = session.settings.fasta.is_some();
    let prompt = arguments.prompt.as_deref().unwrap_or(if dna { "ATG" } else { "And " });
    let model = session.trainer.model().frozen()?;
    let tokenizer = if dna { Tokenizer::Dna } else { Tokenizer::Bytes };
    sample::stream(&model, &tokenizer, prompt, arguments.seed, &arguments.sampling)
}

/// A training under way.
struct Session {
    folder: PathBuf,
    trainer: Trainer,
    text: Text,
    data: TextBatches,
    settings: Settings,
    /// Wall time of the run before this session.
    before: f64,
    start: Instant,
    curve: Curve,
    title: String,
    /// As the family's.
    carry: bool,
    /// Tokens and seconds of the steps of this session.
    stepped: (usize, f64),
}

/// Seconds between checkpoints.
const CHECKPOINT_EVERY: f64 = 30.0;
/// Validation bytes for the points of the curve, and how many points there are.
const PREVIEW_BYTES: usize = 32 * 1024;
const PREVIEWS: f64 = 8.0;

impl Session {
    fn open(family: &Family, arguments: &Arguments) -> Outcome<Self> {
        let Arguments { training, place, .. } = arguments;
        let device = place.device()?;
        let start = Instant::now();
        let session = if training.resume {
            let folder = training.folder(family.name)?;
            let (mut trainer, run): (Trainer, Progress) = Trainer::resume(&folder, &device)?;
            let settings = training.resumed(&run.settings)?;
            if trainer.model().dtype() != place.dtype {
                let was = trainer.model().dtype().as_str();
                return Err(format!("--dtype: the run has {was}, which cannot change").into());
            }
            trainer.model_mut().set_recompute(training.recompute);
            set_form(trainer.model_mut(), arguments.form)?;
            let (text, mut data) = read(&settings, family.carry)?;
            if text.len() != run.text_bytes {
                let reason =
                    format!("the text had {} bytes when the run began, now {}", run.text_bytes, text.len());
                return Err(reason.into());
            }
            data.seek(run.position)?;
            let (before, curve) = (run.seconds, run.curve);
            Self {
                folder,
                trainer,
                text,
                data,
                settings,
                before,
                start,
                curve,
                title: String::new(),
                carry: family.carry,
                stepped: (0, 0.0),
            }
        } else {
            let settings = training.settings(&family.defaults);
            let (text, data) = read(&settings, family.carry)?;
            let vocabulary = if settings.fasta.is_some() { dna::VOCABULARY } else { 256 };
            let config = match &arguments.pattern {
                Some(pattern) => ModelConfig::striped(pattern, settings.hidden, vocabulary)?,
                None => (family.config)(settings.hidden, settings.layers, vocabulary),
            };
            let settings = Settings { layers: config.blocks.len(), ..settings };
            let mut model = LanguageModel::init(&config, arguments.seed, place.dtype, &device)?;
            model.set_recompute(training.recompute);
            set_form(&mut model, arguments.form)?;
            let schedule = training.limit()?.schedule(settings.lr, 0, 0.0);
            let trainer = Trainer::new(model, TrainerConfig::new(schedule))?;
            let folder = training.folder(family.name)?;
            let curve = Curve::default();
            Self {
                folder,
                trainer,
                text,
                data,
                settings,
                before: 0.0,
                start,
                curve,
                title: String::new(),
                carry: family.carry,
                stepped: (0, 0.0),
            }
        };
        let title = session.describe(family.name);
        println!(
            "{title}, on {} bytes of text; run in {}",
            session.text.training().len(),
            session.folder.display()
        );
        Ok(Self { title, ..session })
    }

    fn describe(&self, name: &str) -> String {
        let parameters: usize = self.trainer.model().parameters().values().map(|x| x.elem_count()).sum();
        let Settings { hidden, layers, batch, length, .. } = self.settings;
        format!(
            "{name}: {layers} blocks of width {hidden}, {parameters} parameters, batches of {batch} x {length}"
        )
    }

    /// Wall time of the whole run.
    fn seconds(&self) -> f64 {
        self.before + self.start.elapsed().as_secs_f64()
    }

    fn curve_path(&self) -> PathBuf {
        self.folder.join("loss.svg")
    }

    fn train(&mut self, limit: Limit, gzip: f64) -> Outcome<()> {
        let mut saved = self.seconds();
        let bar = Bar::new(limit.done(self.trainer.steps(), saved))?;
        let mut previews = (limit.done(self.trainer.steps(), saved) * PREVIEWS).floor();
        loop {
            let (steps, seconds) = (self.trainer.steps(), self.seconds());
            let done = limit.done(steps, seconds);
            if done >= 1.0 {
                break;
            }
            if (done * PREVIEWS).floor() > previews {
                previews = (done * PREVIEWS).floor();
                let loss = self.validate(Some(PREVIEW_BYTES))?;
                bar.note(&format!("{:3.0} %  {}, validation {loss:.3}", 100.0 * done, self.status()));
            }
            if seconds - saved > CHECKPOINT_EVERY {
                self.save(gzip)?;
                saved = seconds;
            }
            self.trainer.set_schedule(limit.schedule(self.settings.lr, steps, seconds))?;
            let batch = self.data.next_batch(self.trainer.model().device())?;
            let report = self.trainer.step(&[batch])?;
            self.stepped.0 += report.tokens;
            self.stepped.1 += report.seconds;
            self.curve.training.push((self.trainer.tokens(), report.loss / LN_2));
            bar.show(&report, limit.done(steps + 1, self.seconds()), &self.status());
        }
        bar.finish();
        Ok(())
    }

    /// Tokens per second of the training steps of this session, and the most memory in use.
    fn speed(&self) -> String {
        let speed = self.stepped.0 as f64 / self.stepped.1.max(1e-9);
        let memory = subquadratic::peak_bytes(self.trainer.model().device());
        let memory = memory.map_or(String::new(), |bytes| format!(", {} MB at most", bytes / 1_000_000));
        format!("{speed:.0} tokens/s in training{memory}")
    }

    fn status(&self) -> String {
        format!("step {}, loss {:.3} bits per byte", self.trainer.steps(), self.curve.recent())
    }

    /// The loss in bits per byte on the validation part, or the first `limit` bytes of it; kept for the curve.
    fn validate(&mut self, limit: Option<usize>) -> Outcome<f64> {
        let mut data = self.text.validation_batches(limit, !self.carry)?;
        let device = self.trainer.model().device().clone();
        let batches = (0..data.batches_per_epoch()).map(|_| {
            let batch = data.next_batch(&device)?;
            let carry = batch.carry && self.carry;
            Ok(Batch { carry, ..batch })
        });
        let batches = batches.collect::<Vec<_>>();
        let loss = self.trainer.evaluate(batches)? / LN_2;
        self.curve.validation.push((self.trainer.tokens(), loss));
        Ok(loss)
    }

    /// Writes a checkpoint and the curve.
    fn save(&self, gzip: f64) -> Outcome<()> {
        let progress = Progress {
            settings: self.settings.clone(),
            text_bytes: self.text.len(),
            position: self.data.position(),
            seconds: self.seconds(),
            curve: self.curve.clone(),
        };
        self.trainer.save(&self.folder, &progress, 2)?;
        self.curve.draw(&self.curve_path(), &self.title, gzip)
    }
}

fn read(settings: &Settings, carry: bool) -> Outcome<(Text, TextBatches)> {
    let text = Text::read(settings.text.as_deref(), settings.fasta.as_deref())?;
    let order = if carry { Order::Sequential } else { Order::Shuffled { seed: 0 } };
    let data = TextBatches::bytes(text.training(), settings.batch, settings.length, order)?;
    Ok((text, data))
}

/// A bar on a terminal; elsewhere a line now and then.
struct Bar {
    bar: ProgressBar,
    start: Instant,
    /// How much of the run was done then.
    begin: f64,
}

/// What a whole bar is.
const WHOLE: u64 = 1000;

impl Bar {
    fn new(begin: f64) -> Outcome<Self> {
        let style = ProgressStyle::with_template("{elapsed_precise} [{bar:30}] {msg}")?.progress_chars("=> ");
        Ok(Self { bar: ProgressBar::new(WHOLE).with_style(style), start: Instant::now(), begin })
    }

    /// Shows a step; `done` of the run is done, in this session or before.
    fn show(&self, report: &StepReport, done: f64, status: &str) {
        let elapsed = self.start.elapsed();
        let left = elapsed.as_secs_f64() * (1.0 - done) / (done - self.begin).max(1e-6);
        self.bar.set_position((WHOLE as f64 * done) as u64);
        let (speed, left) = (report.tokens_per_second(), left.min(359_999.0) as u64);
        self.bar.set_message(format!("{status}, {speed:.0} tokens/s, {}:{:02} left", left / 60, left % 60));
    }

    fn note(&self, line: &str) {
        if self.bar.is_hidden() {
            eprintln!("{line}");
        } else {
            self.bar.println(line);
        }
    }

    fn finish(&self) {
        self.bar.finish();
    }
}
