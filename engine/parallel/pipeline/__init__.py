"""Pipeline parallelism: schedules as data, the proof that they run, the layers of each stage, and what runs them."""
