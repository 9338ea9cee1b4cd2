"""python -m pipeline: the same as the `pipeline` command."""

from pipeline.import_path import current_folder_last

if __name__ == "__main__":
    current_folder_last()  # before anything else is looked up
    from pipeline.cli import main

    main()
