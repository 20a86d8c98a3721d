"""Pictures and reports made from the files a run leaves in its work directory."""
