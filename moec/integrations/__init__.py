"""moec inside other libraries; a module here imports the library that it is named after."""
