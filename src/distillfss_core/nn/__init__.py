"""Networks: backbones, teachers, students, and what they share."""
