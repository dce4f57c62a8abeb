from intrafusion.cli.main import main

raise SystemExit(main())
