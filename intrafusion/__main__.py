from intrafusion.cli import main

raise SystemExit(main())
