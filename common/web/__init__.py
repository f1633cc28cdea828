"""The foundation of the console: sessions, guard, pages, texts, events and the server, for every view."""
